"""``python -m bnexport``."""

from bnexport.cli.main import main

if __name__ == "__main__":
    main()
