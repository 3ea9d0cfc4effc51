// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A program with BLOCKS times 2 MiB of text, on 2 MiB boundaries as a linker would
 * put it with -z max-page-size=2097152. It calls a function in every page of it,
 * says so, and stays until its standard input ends. It gives the kernel no hint.
 */
#include <stdio.h>

#define STR_(x) #x
#define STR(x)	STR_(x)

__asm__(".section .text.big, \"ax\", @progbits\n"
	".balign 2097152\n"
	"big_text:\n"
	".rept " STR(BLOCKS) " * 512\n"
	"	mov $1, %eax\n"
	"	ret\n"
	"	.balign 4096, 0xcc\n"
	".endr\n"
	"big_text_end:\n"
	".previous\n");

extern char big_text[], big_text_end[];

int main(void)
{
	long pages = 0;

	for (char *p = big_text; p < big_text_end; p += 4096)
		pages += ((int (*)(void))p)();
	printf("%ld\n", pages);
	fflush(stdout);
	return getchar() == EOF ? 0 : 1;
}
