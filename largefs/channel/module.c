// SPDX-License-Identifier: GPL-2.0-or-later
/* The Python module largefs.channel._companion: sets up companion.c and talks to the device. */
#include "companion.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/fuse.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* What the linux/fuse.h of Debian 12 (7.38) does not have. */
struct backing_map {		/* struct fuse_backing_map of 7.40 */
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
#define BACKING_OPEN		_IOW(FUSE_DEV_IOC_MAGIC, 1, struct backing_map)
#define BACKING_CLOSE		_IOW(FUSE_DEV_IOC_MAGIC, 2, uint32_t)

static PyObject *attach(PyObject *self, PyObject *args)
{
	const struct {
		const char *name;
		void *function;
		bool optional;
	} functions[] = {
		{ "fuse_session_new", &libfuse.session_new, false },
		{ "fuse_session_new_versioned", &libfuse.session_new_versioned, true },
		{ "fuse_session_receive_buf", &libfuse.receive_buf, false },
		{ "fuse_session_process_buf", &libfuse.process_buf, false },
		{ "fuse_session_fd", &libfuse.session_fd, false },
		{ "fuse_session_exit", &libfuse.session_exit, false },
		{ "fuse_session_exited", &libfuse.session_exited, false },
		{ "fuse_reply_open", &libfuse.reply_open, false },
		{ "fuse_reply_create", &libfuse.reply_create, false },
		{ "fuse_reply_none", &libfuse.reply_none, false },
		{ "fuse_add_direntry_plus", &libfuse.add_direntry_plus, false },
	};
	const char *path;
	void *pyfuse3;

	if (!PyArg_ParseTuple(args, "s", &path))
		return NULL;
	pyfuse3 = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
	if (!pyfuse3)
		return PyErr_Format(PyExc_OSError, "%s", dlerror());
	/* Looked up through pyfuse3, dlsym() finds the libfuse that pyfuse3 is linked to. */
	for (size_t i = 0; i < Py_ARRAY_LENGTH(functions); i++) {
		void *function = dlsym(pyfuse3, functions[i].name);

		if (!function && !functions[i].optional)
			return PyErr_Format(PyExc_OSError, "%s", dlerror());
		*(void **)functions[i].function = function;
	}
	Py_RETURN_NONE;
}

static PyObject *negotiate(PyObject *self, PyObject *args)
{
	Py_ssize_t size;
	PyObject *function;
	void *memory;

	if (!PyArg_ParseTuple(args, "nO", &size, &function))
		return NULL;
	if (session.buffer) {
		munmap(session.buffer, session.buffer_size);
		session.buffer = NULL;
	}
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return PyErr_SetFromErrno(PyExc_OSError);
	session.buffer = memory;
	session.buffer_size = size;
	Py_XSETREF(session.edit_init, Py_NewRef(function));
	Py_RETURN_NONE;
}

static PyObject *serve(PyObject *self, PyObject *function)
{
	Py_XSETREF(session.dispatch, function == Py_None ? NULL : Py_NewRef(function));
	Py_RETURN_NONE;
}

static PyObject *reply(PyObject *self, PyObject *args)
{
	const char *message;
	Py_ssize_t size;

	if (!PyArg_ParseTuple(args, "y#", &message, &size))
		return NULL;
	/* ENOENT: the process that asked is gone. */
	if (write(session.device, message, size) < 0 && errno != ENOENT)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *backing_open(PyObject *self, PyObject *args)
{
	struct backing_map map = {};
	int id;

	if (!PyArg_ParseTuple(args, "i", &map.fd))
		return NULL;
	id = ioctl(session.device, BACKING_OPEN, &map);
	return id < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(id);
}

static PyObject *backing_close(PyObject *self, PyObject *args)
{
	uint32_t id;

	if (!PyArg_ParseTuple(args, "I", &id))
		return NULL;
	if (ioctl(session.device, BACKING_CLOSE, &id) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{ "attach", attach, METH_VARARGS,
	  "attach(path): find the libfuse of the loaded pyfuse3 extension at path." },
	{ "negotiate", negotiate, METH_VARARGS,
	  "negotiate(size, edit): receive into size bytes; edit(request, reply) -> reply to INIT." },
	{ "serve", serve, METH_O,
	  "serve(dispatch): offer what pyfuse3 lacks to dispatch(opcode, message) -> bool." },
	{ "reply", reply, METH_VARARGS, "reply(message): write to the device." },
	{ "backing_open", backing_open, METH_VARARGS, "backing_open(fd) -> id" },
	{ "backing_close", backing_close, METH_VARARGS, "backing_close(id)" },
	{}
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_companion",
	.m_doc = "Functions in front of libfuse's; see companion.c.",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__companion(void)
{
	PyObject *module = PyModule_Create(&definition);

	session.backing = PyDict_New();
	if (!module || !session.backing ||
	    PyModule_AddObjectRef(module, "backing", session.backing) < 0)
		return NULL;
	return module;
}
