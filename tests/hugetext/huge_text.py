"""Make a program with much text, whose every page holds a function.

The program calls them all, prints `ready` and waits for the end of its standard input.
"""

import subprocess
from pathlib import Path

SOURCE = """
#include <unistd.h>
__asm__(".text; .balign 2097152; functions:"
        ".rept %d; ret; .balign 4096, 0x90; .endr; functions_end:");
extern char functions[], functions_end[];
int main(void)
{
        char byte;

        for (char *f = functions; f < functions_end; f += 4096)
                ((void (*)(void))f)();
        if (write(1, "ready\\n", 6) != 6)
                return 1;
        return read(0, &byte, 1) < 0;
}
"""


def build(path: Path, mib: int) -> Path:
    """Compile the program, linked so that text is congruent modulo 2 MiB."""
    options = ["-O1", "-x", "c", "-", "-Wl,-z,max-page-size=2097152", "-o", str(path)]
    source = SOURCE % (mib << 8)
    subprocess.run(["gcc", *options], input=source.encode(), check=True)
    return path
