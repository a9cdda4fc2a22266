"""
Runs a program on a machine: in a network namespace, or, where its name is empty, in the network of this process.

    python on_machine.py NAMESPACE PROGRAM ARGUMENT...

PROGRAM is a file, or torchrun. A process that is forked enters a namespace by itself, which `ip netns exec` would do
for a new interpreter.
"""

import ctypes
import os
import runpy
import sys

if __name__ == "__main__":
    namespace, *sys.argv = sys.argv[1:]
    if namespace:
        with open(f"/run/netns/{namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"there is no way into {namespace}")
    if sys.argv[0] == "torchrun":
        from torch.distributed.run import main

        main()
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
