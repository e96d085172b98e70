"""Starts Python many times, each in a fork of this process, which has imported torch and Lightning as the command does.

Each line of the input asks for one start: what to run (`-m` and a module, or `-c` and code) with its arguments, the
folder, the environment, and the files for what it shows. The answer is a line with the exit status. A start that takes
five minutes is ended.
"""

import json
import os
import runpy
import signal
import sys
from importlib import import_module

from nobackprop import quick_start


def serve() -> list[str]:
    """Answers in the process that was started; what to run, in a fork; nothing when the input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(300)
            os.chdir(asked["cwd"])
            os.environ.clear()
            os.environ.update(asked["environment"])
            for number, name in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
            sys.path[0] = ""
            return asked["run"]
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return []


quick_start.start()
import_module("nobackprop.training.run")
if found := serve():
    option, content, *sys.argv[1:] = found
    if option == "-m":
        runpy.run_module(content, run_name="__main__", alter_sys=True)
    else:
        exec(content, {"__name__": "__main__"})
