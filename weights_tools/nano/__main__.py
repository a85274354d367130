"""Print the list of commands: python -m weights_tools.nano"""
import sys

import weights_tools.nano

if __name__ == "__main__":
    print(weights_tools.nano.__doc__.rstrip())
    sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
