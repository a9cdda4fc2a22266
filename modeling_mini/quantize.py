"""The command that quantizes a folder, under the name that it had first: `python -m modeling_mini.quantize`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("modeling_mini.export.quantized", run_name="__main__", alter_sys=True)
