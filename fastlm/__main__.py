"""`python -m fastlm` is the `fastlm` command."""

from fastlm.cli import main

if __name__ == "__main__":
    main()
