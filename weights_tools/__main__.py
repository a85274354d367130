"""Print the list of commands: python -m weights_tools"""
import sys

import weights_tools

if __name__ == "__main__":
    print(weights_tools.__doc__.rstrip())
    # Nothing was done, and a script that forgot the command should notice.
    sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
