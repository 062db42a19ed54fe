import sys

from supy.cli import main

if __name__ == "__main__":
    sys.exit(main())
