"""The command line as its users meet it: a process with arguments, two streams and an exit code.

Importing PyTorch and transformers takes seconds, so one process imports them and forks for every command; the command
runs `export.cli.main` in the fork, with its own working directory, and ends as the program would.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SERVER = """
import json, os, sys, traceback
import export.cli, transformers
from export import samples, engine
transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(order[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["directory"])
    sys.argv = ["sparse-attention", *order["arguments"]]
    code = 0
    try:
        export.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""

PROGRAM = "from export.cli import main; main()"


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of standard output that is not empty."""
        return ([line for line in self.out.splitlines() if line.strip()] or [""])[-1]


class CommandLine:
    """Runs commands one after another, each in a fork of one prepared process."""

    def __init__(self, python: str) -> None:
        self._python = python
        self._server: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: str | Path, directory: Path) -> Done:
        """`sparse-attention *arguments` in `directory`."""
        server = self._started()
        assert server.stdin is not None and server.stdout is not None
        with tempfile.TemporaryDirectory() as streams:
            files = {name: str(Path(streams) / name) for name in ("stdout", "stderr")}
            order = {"arguments": [str(one) for one in arguments], "directory": str(directory), **files}
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            out, err = (Path(files[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return Done(code, out, err)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            self._server = subprocess.Popen(
                [self._python, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )  # fmt: skip
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == "ready\n"
        return self._server

    def close(self) -> None:
        """Ends the prepared process."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(30)
            self._server = None
