"""Several processes that do their parts of a race at once, and what they have to say in the end.

Each process runs one role until its time is over, and answers with counts or with the Difference
that it found. A death by SIGBUS, an error, and an end that does not come are differences, too.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn, cast

from largefs.stress import syscalls
from largefs.stress.report import Difference
from largefs.stress.session import CannotRunError

# called in a process of its own, with its name and when to end (time.monotonic())
Role = Callable[[str, float], Counter[str]]


def play(roles: list[tuple[str, Role]], seconds: float, timeout: float) -> Counter[str]:
    """Run the named roles at once; the sum of their counts. Raises Difference, CannotRunError.

    One that does not end within ``timeout`` seconds after its time hangs.
    """
    until = time.monotonic() + seconds
    children: list[tuple[int, int, str]] = []
    for number, (name, role) in enumerate(roles):
        back, to = os.pipe()
        pid = syscalls.fork()
        if pid == 0:
            os.close(back)
            _child(role, name, f"{number}", until, to)
        os.close(to)
        children.append((pid, back, name))
    total: Counter[str] = Counter()
    problems: list[Exception] = []
    deadline = until + timeout
    try:
        for pid, back, name in children:
            code, answer = _wait(pid, back, deadline)
            if code is None:
                text = f"race: the {name} did not end in {timeout:g} seconds"
                problems.append(Difference("hang", text))
            elif code == -signal.SIGBUS:
                text = f"race: the {name} got SIGBUS in the part that is never cut off"
                problems.append(Difference("sigbus", text))
            elif code == 1 and "kind" in answer:
                problems.append(Difference(**cast(Any, answer)))
            elif code:
                why = answer.get("text", f"exit code {code}")
                problems.append(CannotRunError(f"the {name} of a race failed: {why}"))
            else:
                total.update(answer)
    finally:
        for pid, back, _ in children:
            os.close(back)
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
    if problems:
        raise min(problems, key=lambda p: isinstance(p, CannotRunError))
    return total


def _wait(pid: int, back: int, deadline: float) -> tuple[int | None, dict[str, Any]]:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            answer = os.read(back, 1 << 16)
            return os.waitstatus_to_exitcode(status), json.loads(answer or b"{}")
        if time.monotonic() > deadline:
            return None, {}
        time.sleep(0.01)


def _child(role: Role, name: str, number: str, until: float, to: int) -> NoReturn:
    code, answer = 2, dict[str, Any]()
    try:
        faulthandler.disable()  # a death by SIGBUS is for the parent to tell
        answer = dict(role(number, until))
        code = 0
    except Difference as difference:
        code, answer = 1, difference.as_dict()
    except OSError as error:
        code, answer = 1, Difference("errno", f"race, {name}: {error}").as_dict()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            code, answer = 2, {"text": f"{error.strerror}: make room"}
    except BaseException:  # noqa: BLE001  a child of a fork must never return into its parent's stack
        answer = {"text": traceback.format_exc()}
    finally:
        os.write(to, json.dumps(answer).encode())
        os._exit(code)
