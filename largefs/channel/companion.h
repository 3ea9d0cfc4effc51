/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What companion.c (in front of libfuse) and module.c (beneath Python) share. */
#ifndef LARGEFS_COMPANION_H
#define LARGEFS_COMPANION_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* From libfuse 3.17 on, fuse_session_new() is a macro around the second of these. */
#undef fuse_session_new
struct libfuse_version;
struct fuse_session *fuse_session_new(struct fuse_args *, const struct fuse_lowlevel_ops *,
				      size_t, void *);
struct fuse_session *fuse_session_new_versioned(struct fuse_args *,
						const struct fuse_lowlevel_ops *, size_t,
						struct libfuse_version *, void *);

/* libfuse's own functions, of whichever libfuse pyfuse3 is linked to; attach() finds them. */
struct libfuse {
	__typeof__(fuse_session_new) *session_new;
	__typeof__(fuse_session_new_versioned) *session_new_versioned;
	__typeof__(fuse_session_receive_buf) *receive_buf;
	__typeof__(fuse_session_process_buf) *process_buf;
	__typeof__(fuse_session_fd) *session_fd;
	__typeof__(fuse_session_exit) *session_exit;
	__typeof__(fuse_session_exited) *session_exited;
	__typeof__(fuse_reply_open) *reply_open;
	__typeof__(fuse_reply_create) *reply_create;
	__typeof__(fuse_reply_none) *reply_none;
	__typeof__(fuse_add_direntry_plus) *add_direntry_plus;
};
extern struct libfuse libfuse __attribute__((visibility("hidden")));

/* The one session of this process, and what Python wants of it. */
struct session {
	int device;		/* /dev/fuse; -1 before INIT */
	char *buffer;		/* to receive into; NULL: libfuse receives */
	size_t buffer_size;
	PyObject *edit_init;	/* (request, reply) -> reply */
	PyObject *dispatch;	/* (opcode, message) -> taken? */
	PyObject *backing;	/* {fh: backing id} */
};
extern struct session session __attribute__((visibility("hidden")));

#endif
