"""Writes with a trained model: `python generate.py --prompt "def "`, or `--help all` for every setting."""

from generation_mini.__main__ import main

if __name__ == "__main__":
    main()
