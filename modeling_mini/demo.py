"""The page of the demo, under the name that it had first: `python -m modeling_mini.demo`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("generation_mini.demo", run_name="__main__", alter_sys=True)
