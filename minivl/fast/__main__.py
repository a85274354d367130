"""Print the table `edits.SHIPPED` anew: python -m minivl.fast"""
import argparse

from minivl.fast.edits import HIDDEN, digest, name_of

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m minivl.fast", description=__doc__).parse_args()     # takes no options
    print("SHIPPED = {")
    for owner, name in HIDDEN:
        print(f'    "{name_of(owner, name)}": "{digest(getattr(owner, name))}",')
    print("}")
