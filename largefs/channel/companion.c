// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Functions that stand in front of libfuse's own.
 *
 * load() puts this module into the global scope before pyfuse3 is loaded, so
 * the dynamic linker binds pyfuse3's calls to the functions defined here; they
 * call libfuse's for everything but the few messages that they mean to change:
 *
 *   INIT             libfuse's reply is taken from it and edited (protocol.py)
 *   OPEN, CREATE     the reply may carry a backing file (FOPEN_PASSTHROUGH)
 *   READDIR[PLUS],   with file handle 0 get the node id for a file handle:
 *   FSYNCDIR         pyfuse3 hands its filesystem nothing else
 *   those pyfuse3    go to Python whole (FALLOCATE, LSEEK, COPY_FILE_RANGE,
 *   lacks            TMPFILE), if Python has said that it takes them
 *   WRITE, SETATTR,  that should clear setuid and setgid bits are shown to
 *   OPEN             Python first: pyfuse3 hides the flag that says so
 *
 * From libfuse 3.10 to 3.18 these functions have the same types, with one
 * difference: what is compiled with the headers of 3.17 or newer calls
 * fuse_session_new_versioned() for fuse_session_new(). Libfuse could write a
 * reply with a backing file from 3.17 on; here it is written for all versions in
 * one way, for which fuse_file_info.backing_id is not needed.
 *
 * pyfuse3 calls all of this in one thread, with the GIL held, and has done
 * with a request's message when fuse_session_process_buf() returns: so one
 * receive buffer serves all requests.
 */
#include "companion.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* What the linux/fuse.h of Debian 12 (7.38) does not have. */
#define COPY_FILE_RANGE_64	53
#define OPEN_PASSTHROUGH	(1u << 7)
struct open_out {		/* struct fuse_open_out of 7.40 */
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

struct libfuse libfuse;
struct session session = { .device = -1 };

static uint64_t current;	/* unique of the request in process */

/* pyfuse3's handlers, called through wrappers that give away the request's unique. */
static struct fuse_lowlevel_ops handlers;

/* ---------------------------------------------------------------- replies */

/*
 * fuse_file_info travels from the request to the reply untouched but for fh
 * and three flags, and lock_owner means nothing in OPEN and CREATE: so it
 * carries the request's unique, which fuse_req_t does not let out.
 */
static void open_handler(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	fi->lock_owner = current;
	handlers.open(req, ino, fi);
}

static void create_handler(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
			   struct fuse_file_info *fi)
{
	fi->lock_owner = current;
	handlers.create(req, parent, name, mode, fi);
}

/* A copy of pyfuse3's operations with the wrappers in it, of pyfuse3's size. */
static struct fuse_lowlevel_ops *wrap(const struct fuse_lowlevel_ops *op, size_t op_size)
{
	struct fuse_lowlevel_ops *copy = calloc(1, Py_MAX(op_size, sizeof(*copy)));

	if (!copy)
		return NULL;
	memcpy(copy, op, op_size);
	handlers = *copy;
	if (copy->open)
		copy->open = open_handler;
	if (copy->create)
		copy->create = create_handler;
	return copy;
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
				      size_t op_size, void *userdata)
{
	struct fuse_lowlevel_ops *copy = wrap(op, op_size);
	struct fuse_session *se = libfuse.session_new(args, copy ?: op, op_size, userdata);

	free(copy);
	return se;
}

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
						const struct fuse_lowlevel_ops *op, size_t op_size,
						struct libfuse_version *version, void *userdata)
{
	struct fuse_lowlevel_ops *copy = wrap(op, op_size);
	struct fuse_session *se;

	se = libfuse.session_new_versioned(args, copy ?: op, op_size, version, userdata);
	free(copy);
	return se;
}

/* The backing id to go with this reply, 0 for none. Used once, and not by OPENDIR (no unique). */
static int32_t take_backing(const struct fuse_file_info *fi)
{
	PyObject *key, *value;
	int32_t id = 0;

	if (!fi->lock_owner || !PyDict_GET_SIZE(session.backing))
		return 0;
	key = PyLong_FromUnsignedLongLong(fi->fh);
	value = key ? PyDict_GetItemWithError(session.backing, key) : NULL;
	if (value) {
		id = (int32_t)PyLong_AsLong(value);
		PyDict_DelItem(session.backing, key);
	}
	Py_XDECREF(key);
	PyErr_Clear();
	return id;
}

/*
 * Reply to OPEN (entry NULL) or CREATE in libfuse's stead, and free the request.
 * FOPEN_KEEP_CACHE, which pyfuse3 sets by default, and FOPEN_NONSEEKABLE are left
 * out: with them the kernel refuses FOPEN_PASSTHROUGH (FOPEN_PASSTHROUGH_MASK).
 */
static int reply_passthrough(fuse_req_t req, const struct fuse_file_info *fi,
			     const struct fuse_entry_out *entry, int32_t backing_id)
{
	struct open_out out = {
		.fh = fi->fh,
		.open_flags = OPEN_PASSTHROUGH | (fi->direct_io ? FOPEN_DIRECT_IO : 0),
		.backing_id = backing_id,
	};
	struct fuse_out_header header = { .unique = fi->lock_owner };
	struct iovec iov[] = {
		{ &header, sizeof(header) },
		{ (void *)entry, entry ? sizeof(*entry) : 0 },
		{ &out, sizeof(out) },
	};
	int error;

	header.len = iov[0].iov_len + iov[1].iov_len + iov[2].iov_len;
	error = writev(session.device, iov, 3) < 0 ? -errno : 0;
	libfuse.reply_none(req);
	return error;
}

int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	int32_t id = take_backing(fi);

	return id > 0 ? reply_passthrough(req, fi, NULL, id) : libfuse.reply_open(req, fi);
}

int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *e,
		      const struct fuse_file_info *fi)
{
	struct {		/* what fuse_add_direntry_plus() fills for an empty name */
		struct fuse_entry_out entry;
		char dirent[256];
	} plus = {};
	int32_t id = take_backing(fi);

	if (id <= 0)
		return libfuse.reply_create(req, e, fi);
	libfuse.add_direntry_plus(req, (char *)&plus, sizeof(plus), "", e, 0);
	return reply_passthrough(req, fi, &plus.entry, id);
}

/* --------------------------------------------------------------- requests */

/*
 * As libfuse's, into our buffer. The device is non-blocking (process_init()):
 * between poll and read a request may go, when its process is killed, and a
 * blocking read would stop the event loop until the next one. pyfuse3 goes
 * back to waiting on EINTR, and on no other error.
 */
int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	ssize_t n;

	if (!session.buffer)
		return libfuse.receive_buf(se, buf);
	n = read(libfuse.session_fd(se), session.buffer, session.buffer_size);
	if (libfuse.session_exited(se))
		return 0;
	if (n < 0 && errno == ENODEV) {		/* unmounted */
		libfuse.session_exit(se);
		return 0;
	}
	if (n < 0)
		return errno == EAGAIN || errno == ENOENT ? -EINTR : -errno;
	if ((size_t)n < sizeof(struct fuse_in_header))
		return -EIO;
	buf->size = n;				/* buf->mem stays NULL: pyfuse3 frees it */
	return n;
}

/* Call a Python function and return what it returned; NULL, with a traceback, if it raised. */
static PyObject *call(PyObject *function, const char *format, ...)
{
	PyObject *args, *result = NULL;
	va_list va;

	va_start(va, format);
	args = Py_VaBuildValue(format, va);
	va_end(va);
	if (args)
		result = PyObject_CallObject(function, args);
	Py_XDECREF(args);
	if (!result)
		PyErr_WriteUnraisable(function);
	return result;
}

/* Send Python's version of libfuse's reply to INIT, or libfuse's own if Python has none. */
static void answer_init(const struct fuse_buf *request, const char *reply, ssize_t len)
{
	PyObject *edited;
	char *bytes = (char *)reply;
	Py_ssize_t n = len;

	edited = call(session.edit_init, "(y#y#)", request->mem, (Py_ssize_t)request->size,
		      reply, (Py_ssize_t)len);
	if (edited && PyBytes_AsStringAndSize(edited, &bytes, &n) < 0)
		PyErr_WriteUnraisable(session.edit_init);
	if (write(session.device, bytes, n) < 0 && bytes != reply &&
	    write(session.device, reply, len) < 0)
		perror("largefs: reply to FUSE_INIT");
	Py_XDECREF(edited);
}

/*
 * libfuse has no way to see its reply to INIT. So it answers into a socket,
 * put in the place of the device for as long as it processes this one request;
 * nothing else is under way before INIT is answered.
 */
static void process_init(struct fuse_session *se, const struct fuse_buf *request)
{
	int fd = libfuse.session_fd(se), kept, pair[2];
	char reply[4096];
	ssize_t len;

	session.device = fd;
	if (session.buffer)
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	kept = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (!session.edit_init || kept < 0 ||
	    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
		libfuse.process_buf(se, request);
		goto out;
	}
	dup3(pair[1], fd, O_CLOEXEC);
	libfuse.process_buf(se, request);
	dup3(kept, fd, O_CLOEXEC);
	len = recv(pair[0], reply, sizeof(reply), MSG_DONTWAIT);
	if (len > 0)
		answer_init(request, reply, len);
	close(pair[0]);
	close(pair[1]);
out:
	if (kept >= 0)
		close(kept);
}

/* The file handle in READDIR, READDIRPLUS (fuse_read_in) and FSYNCDIR (fuse_fsync_in). */
static void name_directory(struct fuse_in_header *in, size_t size)
{
	uint64_t *fh = (uint64_t *)(in + 1);

	_Static_assert(offsetof(struct fuse_read_in, fh) == 0, "fh comes first");
	_Static_assert(offsetof(struct fuse_fsync_in, fh) == 0, "fh comes first");
	if (size >= sizeof(*in) + sizeof(*fh) && *fh == 0)
		*fh = in->nodeid;
}

/* Does the kernel leave it to us to clear the file's setuid and setgid bits (KILLPRIV_V2)? */
static bool kills_privileges(const struct fuse_in_header *in, size_t size)
{
	const void *body = in + 1;

	size -= sizeof(*in);
	switch (in->opcode) {
	case FUSE_WRITE:
		return size >= sizeof(struct fuse_write_in) &&
		       ((const struct fuse_write_in *)body)->write_flags & FUSE_WRITE_KILL_SUIDGID;
	case FUSE_SETATTR:
		return size >= sizeof(struct fuse_setattr_in) &&
		       ((const struct fuse_setattr_in *)body)->valid & FATTR_KILL_SUIDGID;
	case FUSE_OPEN:
		return size >= sizeof(struct fuse_open_in) &&
		       ((const struct fuse_open_in *)body)->open_flags & FUSE_OPEN_KILL_SUIDGID;
	default:
		return false;
	}
}

/* Has Python taken the request? */
static bool dispatched(const struct fuse_in_header *in, size_t size)
{
	PyObject *taken;
	bool result;

	if (!session.dispatch)
		return false;
	taken = call(session.dispatch, "(Iy#)", in->opcode, (const char *)in, (Py_ssize_t)size);
	result = taken == Py_True;
	Py_XDECREF(taken);
	return result;
}

void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
	struct fuse_buf request = *buf;
	struct fuse_in_header *in;

	if (session.buffer)
		request.mem = session.buffer;
	if (!(request.flags & FUSE_BUF_IS_FD)) {
		in = request.mem;
		current = in->unique;
		switch (in->opcode) {
		case FUSE_INIT:
			process_init(se, &request);
			return;
		case FUSE_READDIR:
		case FUSE_READDIRPLUS:
		case FUSE_FSYNCDIR:
			name_directory(in, request.size);
			break;
		case FUSE_WRITE:
		case FUSE_SETATTR:
		case FUSE_OPEN:
			if (kills_privileges(in, request.size) &&
			    dispatched(in, Py_MIN(request.size, sizeof(*in) + 64)))
				return;
			break;
		case FUSE_FALLOCATE:
		case FUSE_LSEEK:
		case FUSE_COPY_FILE_RANGE:
		case FUSE_TMPFILE:
		case COPY_FILE_RANGE_64:
		case FUSE_INTERRUPT:
			if (dispatched(in, request.size))
				return;
		}
	}
	libfuse.process_buf(se, &request);
}
