// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Map a file as the loader maps text, and tell what touching it does.
 *
 *	mapper FILE LENGTH private|shared
 *
 * maps LENGTH bytes of FILE, readable and executable, at a multiple of 2 MiB and
 * prints the address (hexadecimal). Then it takes commands, one a line:
 *
 *	touch		read a byte of every page; answers with the number of pages
 *			read before the first SIGBUS and of those read after it
 *	hugepage	madvise(MADV_HUGEPAGE); answers 0 or an errno
 *	collapse	madvise(MADV_COLLAPSE), likewise
 *	drop		madvise(MADV_DONTNEED), likewise: forget what is mapped
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif
#define PMD_SIZE	(2UL << 20)
#define PAGE		4096UL

static sigjmp_buf beyond_end;

static void on_sigbus(int sig)
{
	siglongjmp(beyond_end, sig);
}

static char *map_aligned(int fd, size_t length, int flags)
{
	char *p = mmap(NULL, length + PMD_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *at = (char *)(((uintptr_t)p + PMD_SIZE - 1) & ~(PMD_SIZE - 1));

	if (p == MAP_FAILED)
		err(1, "reserve");
	if (mmap(at, length, PROT_READ | PROT_EXEC, flags | MAP_FIXED, fd, 0) == MAP_FAILED)
		err(1, "mmap");
	return at;
}

static void touch(const volatile char *map, size_t length)
{
	static volatile size_t offset, before, after;
	static volatile int failed;

	before = after = failed = 0;
	for (offset = 0; offset < length; offset += PAGE) {
		if (sigsetjmp(beyond_end, 1)) {
			failed = 1;
			continue;
		}
		(void)map[offset];
		if (failed)
			after++;
		else
			before++;
	}
	printf("%zu %zu\n", before, after);
}

int main(int argc, char **argv)
{
	char line[32], *map;
	size_t length;
	int fd;

	if (argc != 4)
		errx(2, "usage: mapper FILE LENGTH private|shared");
	fd = open(argv[1], O_RDONLY);
	if (fd < 0)
		err(1, "%s", argv[1]);
	length = strtoul(argv[2], NULL, 0);
	map = map_aligned(fd, length, strcmp(argv[3], "shared") ? MAP_PRIVATE : MAP_SHARED);
	signal(SIGBUS, on_sigbus);
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("%lx\n", (unsigned long)map);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "touch\n"))
			touch(map, length);
		else if (!strcmp(line, "hugepage\n"))
			printf("%d\n", madvise(map, length, MADV_HUGEPAGE) ? errno : 0);
		else if (!strcmp(line, "collapse\n"))
			printf("%d\n", madvise(map, length, MADV_COLLAPSE) ? errno : 0);
		else if (!strcmp(line, "drop\n"))
			printf("%d\n", madvise(map, length, MADV_DONTNEED) ? errno : 0);
		else
			errx(2, "bad command: %s", line);
	}
	return 0;
}
