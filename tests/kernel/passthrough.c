// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A plain passthrough filesystem on the bare FUSE protocol, for testing a kernel.
 *
 *	passthrough [--opt-in] [--writeback] [--auto-inval] [--max-write BYTES]
 *		    SOURCE MOUNTPOINT
 *
 * It shows SOURCE at MOUNTPOINT and knows nothing of largefs, so that what
 * goes wrong is the kernel's doing. --opt-in asks for large folios at INIT
 * and reports a block size of 2 MiB for regular files. It speaks the protocol
 * itself because the flag and the request sizes have to be under its control,
 * whatever libfuse there is.
 *
 * It prints the INIT flags that the kernel offers (hexadecimal) once it is
 * ready, serves until it is unmounted, and meanwhile takes commands on its
 * standard input, one a line, answering each with "0" or an errno:
 *
 *	inval NAME OFFSET LENGTH	FUSE_NOTIFY_INVAL_INODE; LENGTH 0: to the end
 *	store NAME OFFSET LENGTH CHAR	FUSE_NOTIFY_STORE of LENGTH times CHAR
 *
 * NAME is a file that the kernel has looked up, relative to SOURCE.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

/* The series' flag, at the top of the range that nobody has been given. */
#define FUSE_INODE_LARGE_FOLIOS	(1ULL << 62)

#define PMD_SIZE	(2U << 20)
#define THREADS		3

struct node {
	struct node *next;
	dev_t dev;
	ino_t ino;
	int fd;			/* O_PATH */
	uint64_t lookups;
};

struct request {
	struct fuse_in_header *in;
	void *arg;		/* after the header */
	char *reply;		/* room for max_write bytes */
};

static bool opt_in, writeback, auto_inval;
static uint32_t max_write = 1U << 20;
static int dev_fd;
static struct node root = { .lookups = 2 };
static pthread_mutex_t nodes_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t offered;
static pthread_barrier_t initialised;

static void reply(struct request *req, int error, const void *data, size_t size)
{
	struct fuse_out_header out = {
		.len = sizeof(out) + size,
		.error = -error,
		.unique = req->in->unique,
	};
	struct iovec iov[] = { { &out, sizeof(out) }, { (void *)data, size } };

	/* ENOENT: the request was interrupted; ENODEV: unmounted meanwhile */
	if (writev(dev_fd, iov, 2) < 0 && errno != ENOENT && errno != ENODEV)
		err(1, "reply to opcode %u", req->in->opcode);
}

static void reply_status(struct request *req, int result)
{
	reply(req, result < 0 ? errno : 0, NULL, 0);
}

static struct node *node_of(uint64_t id)
{
	return id == FUSE_ROOT_ID ? &root : (struct node *)(uintptr_t)id;
}

static uint64_t id_of(struct node *node)
{
	return node == &root ? FUSE_ROOT_ID : (uintptr_t)node;
}

static int fd_of(struct request *req)
{
	return node_of(req->in->nodeid)->fd;
}

/* A path by which an O_PATH descriptor's file can be opened and changed. */
static const char *proc_path(struct request *req, char buf[32])
{
	snprintf(buf, 32, "/proc/self/fd/%d", fd_of(req));
	return buf;
}

static struct node *find_node(dev_t dev, ino_t ino)
{
	for (struct node *n = &root; n; n = n->next)
		if (n->ino == ino && n->dev == dev)
			return n;
	return NULL;
}

/* The node for an O_PATH descriptor, which it takes over; counts one lookup. */
static struct node *get_node(int fd, const struct stat *st)
{
	struct node *n;

	pthread_mutex_lock(&nodes_lock);
	n = find_node(st->st_dev, st->st_ino);
	if (n) {
		close(fd);
	} else {
		n = calloc(1, sizeof(*n));
		if (!n)
			err(1, "calloc");
		n->dev = st->st_dev;
		n->ino = st->st_ino;
		n->fd = fd;
		n->next = root.next;
		root.next = n;
	}
	n->lookups++;
	pthread_mutex_unlock(&nodes_lock);
	return n;
}

static void put_node(uint64_t id, uint64_t lookups)
{
	struct node *n = node_of(id), **p;

	if (n == &root)
		return;
	pthread_mutex_lock(&nodes_lock);
	n->lookups -= lookups;
	if (!n->lookups) {
		for (p = &root.next; *p != n; p = &(*p)->next)
			;
		*p = n->next;
		close(n->fd);
		free(n);
	}
	pthread_mutex_unlock(&nodes_lock);
}

static void fill_attr(struct fuse_attr *attr, const struct stat *st)
{
	*attr = (struct fuse_attr) {
		.ino = st->st_ino,
		.size = st->st_size,
		.blocks = st->st_blocks,
		.atime = st->st_atim.tv_sec,
		.mtime = st->st_mtim.tv_sec,
		.ctime = st->st_ctim.tv_sec,
		.atimensec = st->st_atim.tv_nsec,
		.mtimensec = st->st_mtim.tv_nsec,
		.ctimensec = st->st_ctim.tv_nsec,
		.mode = st->st_mode,
		.nlink = st->st_nlink,
		.uid = st->st_uid,
		.gid = st->st_gid,
		.rdev = st->st_rdev,
		.blksize = st->st_blksize,
	};
	if (opt_in && S_ISREG(st->st_mode))
		attr->blksize = PMD_SIZE;
}

static int fill_entry(struct request *req, const char *name, struct fuse_entry_out *out)
{
	struct stat st;
	int fd = openat(fd_of(req), name, O_PATH | O_NOFOLLOW);

	if (fd < 0)
		return -1;
	if (fstat(fd, &st) < 0) {
		close(fd);
		return -1;
	}
	*out = (struct fuse_entry_out) {
		.nodeid = id_of(get_node(fd, &st)),
		.entry_valid = 1,
		.attr_valid = 1,
	};
	fill_attr(&out->attr, &st);
	return 0;
}

static void reply_entry(struct request *req, const char *name)
{
	struct fuse_entry_out out;

	if (fill_entry(req, name, &out) < 0)
		reply_status(req, -1);
	else
		reply(req, 0, &out, sizeof(out));
}

static void reply_attr(struct request *req)
{
	struct fuse_attr_out out = { .attr_valid = 1 };
	struct stat st;

	if (fstat(fd_of(req), &st) < 0) {
		reply_status(req, -1);
		return;
	}
	fill_attr(&out.attr, &st);
	reply(req, 0, &out, sizeof(out));
}

static void do_init(struct request *req)
{
	struct fuse_init_in *in = req->arg;
	uint64_t want = FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES |
		FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_INIT_EXT;
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = in->minor,
		.max_readahead = in->max_readahead,
		.max_background = 16,
		.congestion_threshold = 12,
		.max_write = max_write,
		.max_pages = max_write / 4096,
		.time_gran = 1,
	};

	offered = in->flags;
	if (offered & FUSE_INIT_EXT)
		offered |= (uint64_t)in->flags2 << 32;
	if (writeback)
		want |= FUSE_WRITEBACK_CACHE;
	if (auto_inval)
		want |= FUSE_AUTO_INVAL_DATA;
	if (opt_in)
		want |= FUSE_INODE_LARGE_FOLIOS;
	want &= offered;
	out.flags = want;
	out.flags2 = want >> 32;
	reply(req, 0, &out, sizeof(out));
}

static int apply_times(const struct fuse_setattr_in *in, const char *path)
{
	struct timespec ts[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_nsec = UTIME_OMIT } };

	if (in->valid & FATTR_ATIME_NOW)
		ts[0].tv_nsec = UTIME_NOW;
	else if (in->valid & FATTR_ATIME)
		ts[0] = (struct timespec) { in->atime, in->atimensec };
	if (in->valid & FATTR_MTIME_NOW)
		ts[1].tv_nsec = UTIME_NOW;
	else if (in->valid & FATTR_MTIME)
		ts[1] = (struct timespec) { in->mtime, in->mtimensec };
	return utimensat(AT_FDCWD, path, ts, 0);
}

static int apply_attr(struct request *req)
{
	struct fuse_setattr_in *in = req->arg;
	char buf[32];
	const char *path = proc_path(req, buf);

	if (in->valid & FATTR_MODE && chmod(path, in->mode) < 0)
		return -1;
	if (in->valid & (FATTR_UID | FATTR_GID) &&
	    fchownat(fd_of(req), "", in->valid & FATTR_UID ? in->uid : (uid_t)-1,
		     in->valid & FATTR_GID ? in->gid : (gid_t)-1,
		     AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0)
		return -1;
	if (in->valid & FATTR_SIZE && (in->valid & FATTR_FH ? ftruncate(in->fh, in->size)
							    : truncate(path, in->size)) < 0)
		return -1;
	if (in->valid & (FATTR_ATIME | FATTR_MTIME))
		return apply_times(in, path);
	return 0;
}

static void do_setattr(struct request *req)
{
	if (apply_attr(req) < 0)
		reply_status(req, -1);
	else
		reply_attr(req);
}

/*
 * The writeback cache reads files that are open for writing. The kernel says at which offset to
 * write, stores through a mapping too, by whichever handle it has: never append.
 */
static int backing_flags(int flags)
{
	if (writeback && (flags & O_ACCMODE) == O_WRONLY)
		flags = (flags & ~O_ACCMODE) | O_RDWR;
	return flags & ~(O_APPEND | O_NOFOLLOW | O_DIRECT | O_EXCL);
}

static void do_open(struct request *req)
{
	struct fuse_open_in *in = req->arg;
	struct fuse_open_out out = { .open_flags = FOPEN_KEEP_CACHE };
	char buf[32];
	int fd = open(proc_path(req, buf), backing_flags(in->flags));

	out.fh = fd;
	if (fd < 0)
		reply_status(req, -1);
	else
		reply(req, 0, &out, sizeof(out));
}

static void do_create(struct request *req)
{
	struct fuse_create_in *in = req->arg;
	const char *name = (char *)(in + 1);
	struct {
		struct fuse_entry_out entry;
		struct fuse_open_out open;
	} out = {};
	int fd = openat(fd_of(req), name,
			backing_flags(in->flags) | O_CREAT | (in->flags & O_EXCL), in->mode);

	if (fd < 0 || fill_entry(req, name, &out.entry) < 0) {
		reply_status(req, -1);
		return;
	}
	out.open.fh = fd;
	reply(req, 0, &out, sizeof(out));
}

static void do_read(struct request *req)
{
	struct fuse_read_in *in = req->arg;
	size_t done = 0;
	ssize_t n = 1;

	while (done < in->size && n > 0) {
		n = pread(in->fh, req->reply + done, in->size - done, in->offset + done);
		if (n > 0)
			done += n;
	}
	if (n < 0)
		reply_status(req, -1);
	else
		reply(req, 0, req->reply, done);
}

static void do_write(struct request *req)
{
	struct fuse_write_in *in = req->arg;
	struct fuse_write_out out = {};
	ssize_t n = pwrite(in->fh, in + 1, in->size, in->offset);

	out.size = n;
	if (n < 0)
		reply_status(req, -1);
	else
		reply(req, 0, &out, sizeof(out));
}

static void do_lseek(struct request *req)
{
	struct fuse_lseek_in *in = req->arg;
	struct fuse_lseek_out out = { lseek(in->fh, in->offset, in->whence) };

	if ((off_t)out.offset < 0)
		reply_status(req, -1);
	else
		reply(req, 0, &out, sizeof(out));
}

static void do_copy_file_range(struct request *req)
{
	struct fuse_copy_file_range_in *in = req->arg;
	off_t from = in->off_in, to = in->off_out;
	struct fuse_write_out out = {};
	ssize_t n = copy_file_range(in->fh_in, &from, in->fh_out, &to, in->len, in->flags);

	out.size = n;
	if (n < 0)
		reply_status(req, -1);
	else
		reply(req, 0, &out, sizeof(out));
}

static void do_opendir(struct request *req)
{
	struct fuse_open_out out = {};
	int fd = openat(fd_of(req), ".", O_RDONLY | O_DIRECTORY);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);

	out.fh = (uintptr_t)dir;
	if (!dir)
		reply_status(req, -1);
	else
		reply(req, 0, &out, sizeof(out));
}

static void do_readdir(struct request *req)
{
	struct fuse_read_in *in = req->arg;
	DIR *dir = (DIR *)(uintptr_t)in->fh;
	size_t done = 0, size;
	struct dirent *e;

	seekdir(dir, in->offset);
	while ((e = readdir(dir))) {
		struct fuse_dirent *d = (void *)(req->reply + done);

		size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + strlen(e->d_name));
		if (done + size > in->size)
			break;
		memset(d, 0, size);
		d->ino = e->d_ino;
		d->off = e->d_off;
		d->namelen = strlen(e->d_name);
		d->type = e->d_type;
		memcpy(d->name, e->d_name, d->namelen);
		done += size;
	}
	reply(req, 0, req->reply, done);
}

static void do_statfs(struct request *req)
{
	struct fuse_statfs_out out = {};
	struct statvfs st;

	if (fstatvfs(fd_of(req), &st) < 0) {
		reply_status(req, -1);
		return;
	}
	out.st = (struct fuse_kstatfs) {
		.blocks = st.f_blocks,
		.bfree = st.f_bfree,
		.bavail = st.f_bavail,
		.files = st.f_files,
		.ffree = st.f_ffree,
		.bsize = st.f_bsize,
		.namelen = st.f_namemax,
		.frsize = st.f_frsize,
	};
	reply(req, 0, &out, sizeof(out));
}

static void do_rename(struct request *req, uint64_t newdir, unsigned int flags, const char *name)
{
	const char *newname = name + strlen(name) + 1;

	reply_status(req, renameat2(fd_of(req), name, node_of(newdir)->fd, newname, flags));
}

static void do_link(struct request *req)
{
	struct fuse_link_in *in = req->arg;
	const char *name = (char *)(in + 1);
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", node_of(in->oldnodeid)->fd);
	if (linkat(AT_FDCWD, path, fd_of(req), name, AT_SYMLINK_FOLLOW) < 0)
		reply_status(req, -1);
	else
		reply_entry(req, name);
}

static void do_mknod(struct request *req)
{
	struct fuse_mknod_in *in = req->arg;
	const char *name = (char *)(in + 1);

	if (mknodat(fd_of(req), name, in->mode, in->rdev) < 0)
		reply_status(req, -1);
	else
		reply_entry(req, name);
}

static void do_mkdir(struct request *req)
{
	struct fuse_mkdir_in *in = req->arg;
	const char *name = (char *)(in + 1);

	if (mkdirat(fd_of(req), name, in->mode) < 0)
		reply_status(req, -1);
	else
		reply_entry(req, name);
}

static void do_symlink(struct request *req)
{
	const char *name = req->arg, *target = name + strlen(name) + 1;

	if (symlinkat(target, fd_of(req), name) < 0)
		reply_status(req, -1);
	else
		reply_entry(req, name);
}

static void do_readlink(struct request *req)
{
	ssize_t n = readlinkat(fd_of(req), "", req->reply, 4095);

	if (n < 0)
		reply_status(req, -1);
	else
		reply(req, 0, req->reply, n);
}

static void do_batch_forget(struct request *req)
{
	struct fuse_batch_forget_in *in = req->arg;
	struct fuse_forget_one *one = (void *)(in + 1);

	for (uint32_t i = 0; i < in->count; i++)
		put_node(one[i].nodeid, one[i].nlookup);
}

static void serve_names(struct request *req)
{
	struct fuse_rename_in *ren = req->arg;
	struct fuse_rename2_in *ren2 = req->arg;

	switch (req->in->opcode) {
	case FUSE_LOOKUP: return reply_entry(req, req->arg);
	case FUSE_FORGET: return put_node(req->in->nodeid, *(uint64_t *)req->arg);
	case FUSE_BATCH_FORGET: return do_batch_forget(req);
	case FUSE_MKNOD: return do_mknod(req);
	case FUSE_MKDIR: return do_mkdir(req);
	case FUSE_SYMLINK: return do_symlink(req);
	case FUSE_READLINK: return do_readlink(req);
	case FUSE_LINK: return do_link(req);
	case FUSE_UNLINK: return reply_status(req, unlinkat(fd_of(req), req->arg, 0));
	case FUSE_RMDIR: return reply_status(req, unlinkat(fd_of(req), req->arg, AT_REMOVEDIR));
	case FUSE_RENAME: return do_rename(req, ren->newdir, 0, (char *)(ren + 1));
	case FUSE_RENAME2: return do_rename(req, ren2->newdir, ren2->flags, (char *)(ren2 + 1));
	case FUSE_INTERRUPT: return;	/* every request ends by itself */
	default: reply(req, ENOSYS, NULL, 0);
	}
}

static void serve(struct request *req)
{
	struct fuse_fsync_in *sync = req->arg;
	struct fuse_release_in *rel = req->arg;
	struct fuse_fallocate_in *fa = req->arg;

	switch (req->in->opcode) {
	case FUSE_INIT:
		do_init(req);
		pthread_barrier_wait(&initialised);
		return;
	case FUSE_GETATTR: return reply_attr(req);
	case FUSE_SETATTR: return do_setattr(req);
	case FUSE_OPEN: return do_open(req);
	case FUSE_CREATE: return do_create(req);
	case FUSE_READ: return do_read(req);
	case FUSE_WRITE: return do_write(req);
	case FUSE_FSYNC: return reply_status(req, sync->fsync_flags & FUSE_FSYNC_FDATASYNC ?
						  fdatasync(sync->fh) : fsync(sync->fh));
	case FUSE_FLUSH: return reply(req, 0, NULL, 0);
	case FUSE_RELEASE: return reply_status(req, close(rel->fh));
	case FUSE_FALLOCATE: return reply_status(req, fallocate(fa->fh, fa->mode, fa->offset,
								fa->length));
	case FUSE_LSEEK: return do_lseek(req);
	case FUSE_COPY_FILE_RANGE: return do_copy_file_range(req);
	case FUSE_OPENDIR: return do_opendir(req);
	case FUSE_READDIR: return do_readdir(req);
	case FUSE_RELEASEDIR: return reply_status(req, closedir((DIR *)(uintptr_t)rel->fh));
	case FUSE_STATFS: return do_statfs(req);
	default: serve_names(req);
	}
}

static void *worker(void *unused)
{
	size_t size = max_write + 8192;
	char *buf = aligned_alloc(4096, size), *room = aligned_alloc(4096, size);
	ssize_t n;

	if (!buf || !room)
		err(1, "aligned_alloc");
	for (;;) {
		struct request req = { .in = (void *)buf, .reply = room };

		n = read(dev_fd, buf, size);
		if (n < 0 && errno == ENODEV)
			exit(0);	/* unmounted */
		if (n < 0 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))
			continue;
		if (n < 0)
			err(1, "read from /dev/fuse");
		buf[n] = 0;
		req.arg = buf + sizeof(*req.in);
		serve(&req);
	}
	return unused;
}

/* Send a notification about the file NAME; returns 0 or an errno. */
static int notify(const char *what, const char *name, uint64_t off, uint64_t len, char fill)
{
	struct fuse_notify_inval_inode_out inval = { .off = off, .len = len };
	struct fuse_notify_store_out store = { .offset = off, .size = len };
	bool storing = !strcmp(what, "store");
	struct fuse_out_header out = { .error = storing ? FUSE_NOTIFY_STORE
							: FUSE_NOTIFY_INVAL_INODE };
	struct iovec iov[3] = { { &out, sizeof(out) }, { &inval, sizeof(inval) } };
	struct stat st;
	struct node *n;
	int result;

	if (fstatat(root.fd, name, &st, 0) < 0)
		return errno;
	pthread_mutex_lock(&nodes_lock);
	n = find_node(st.st_dev, st.st_ino);
	pthread_mutex_unlock(&nodes_lock);
	if (!n)
		return ESTALE;
	inval.ino = id_of(n);
	store.nodeid = id_of(n);
	if (storing) {
		iov[1] = (struct iovec) { &store, sizeof(store) };
		iov[2] = (struct iovec) { malloc(len), len };
		memset(iov[2].iov_base, fill, len);
	}
	out.len = sizeof(out) + iov[1].iov_len + iov[2].iov_len;
	result = writev(dev_fd, iov, storing ? 3 : 2) < 0 ? errno : 0;
	free(iov[2].iov_base);
	return result;
}

static void take_commands(void)
{
	char line[512], what[16], name[256], fill;
	uint64_t off, len;

	while (fgets(line, sizeof(line), stdin)) {
		fill = 0;
		if (sscanf(line, "%15s %255s %" SCNu64 " %" SCNu64 " %c", what, name, &off, &len,
			   &fill) < 4)
			errx(2, "bad command: %s", line);
		printf("%d\n", notify(what, name, off, len, fill));
		fflush(stdout);
	}
}

static void mount_fuse(const char *source, const char *mountpoint)
{
	struct stat st;
	char options[256];

	root.fd = open(source, O_PATH | O_DIRECTORY);
	if (root.fd < 0 || fstat(root.fd, &st) < 0)
		err(1, "%s", source);
	root.dev = st.st_dev;
	root.ino = st.st_ino;
	dev_fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (dev_fd < 0)
		err(1, "/dev/fuse");
	snprintf(options, sizeof(options),
		 "fd=%d,rootmode=%o,user_id=0,group_id=0,default_permissions,allow_other", dev_fd,
		 st.st_mode & S_IFMT);
	if (mount("passthrough", mountpoint, "fuse.passthrough", MS_NODEV | MS_NOSUID, options) < 0)
		err(1, "mount on %s", mountpoint);
}

int main(int argc, char **argv)
{
	static const struct option longopts[] = {
		{ "opt-in", no_argument, NULL, 'o' },
		{ "writeback", no_argument, NULL, 'w' },
		{ "auto-inval", no_argument, NULL, 'a' },
		{ "max-write", required_argument, NULL, 'm' },
		{},
	};
	pthread_t thread;
	int c;

	while ((c = getopt_long(argc, argv, "", longopts, NULL)) != -1) {
		switch (c) {
		case 'o': opt_in = true; break;
		case 'w': writeback = true; break;
		case 'a': auto_inval = true; break;
		case 'm': max_write = strtoul(optarg, NULL, 0); break;
		default: return 2;
		}
	}
	if (argc - optind != 2)
		errx(2, "usage: passthrough [OPTION...] SOURCE MOUNTPOINT");
	umask(0);
	mount_fuse(argv[optind], argv[optind + 1]);
	pthread_barrier_init(&initialised, NULL, 2);
	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&thread, NULL, worker, NULL))
			errx(1, "pthread_create");
	pthread_barrier_wait(&initialised);
	printf("%" PRIx64 "\n", offered);
	fflush(stdout);
	take_commands();
	pthread_join(thread, NULL);
}
