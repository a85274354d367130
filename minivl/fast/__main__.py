"""Print the table `edits.SHIPPED` anew: python -m minivl.fast"""
from minivl.fast.edits import HIDDEN, digest, name_of

if __name__ == "__main__":
    print("SHIPPED = {")
    for owner, name in HIDDEN:
        print(f'    "{name_of(owner, name)}": "{digest(getattr(owner, name))}",')
    print("}")
