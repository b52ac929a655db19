/* Counts what is executed for one stage of a request at a time, under valgrind's callgrind; built and driven by bench/stages.py.
 *
 * A stage is a number that the resolver (Python) gives to a code object, or to a compiled function's symbol, when it is first met. Every
 * Python frame passes through `eval` (PEP 523), every function that mypyc compiled with -finstrument-functions through the two hooks at the
 * end: there collecting is switched off, the stage is changed, and collecting goes on if that is the stage that is counted. So a stage gets
 * what its frames execute themselves and what they call in C, and these hooks are in nobody's count.
 */
#define _GNU_SOURCE
#define Py_BUILD_CORE 1
#include <Python.h>
#include <dlfcn.h>
#include <internal/pycore_frame.h>
#include <stdint.h>
#include <valgrind/callgrind.h>

enum { NOBODY = -2, INHERITED = -1, DEEPEST = 1 << 14, FUNCTIONS = 1 << 16 };

static PyObject *resolver;
static Py_ssize_t extra;
static int target = NOBODY, installed;
static __thread int current = NOBODY, collecting, resolving, depth, stack[DEEPEST];
static struct { void *function; int stage; } known[FUNCTIONS];

static void collect(int wanted) {
    if (wanted != collecting) {
        collecting = wanted;
        CALLGRIND_TOGGLE_COLLECT;
    }
}

static void enter(int stage) {
    current = stage;
    collect(stage == target);
}

/* The resolver's answer; an exception that is being raised is left as it is. */
static int ask(PyObject *about) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    resolving = 1;
    PyObject *answer = about == NULL ? NULL : PyObject_CallOneArg(resolver, about);
    resolving = 0;
    if (answer == NULL) {
        PyErr_Print();
        abort();
    }
    int stage = (int)PyLong_AsLong(answer);
    Py_DECREF(answer);
    PyErr_Restore(type, value, trace);
    return stage;
}

static int stage_of_code(PyObject *code) {
    void *found = NULL;
    _PyCode_GetExtra(code, extra, &found);
    if (found == NULL) {
        found = (void *)(intptr_t)(ask(code) + 2); /* never NULL: the least stage is -1 */
        _PyCode_SetExtra(code, extra, found);
    }
    return (int)(intptr_t)found - 2;
}

static PyObject *eval(PyThreadState *state, struct _PyInterpreterFrame *frame, int throwing) {
    if (resolving)
        return _PyEval_EvalFrameDefault(state, frame, throwing);
    collect(0);
    int before = current;
#if PY_VERSION_HEX >= 0x030C0000
    PyObject *code = PyUnstable_InterpreterFrame_GetCode(frame);
    int stage = stage_of_code(code);
    Py_DECREF(code);
#else
    int stage = stage_of_code((PyObject *)frame->f_code);
#endif
    enter(stage == INHERITED ? before : stage);
    PyObject *result = _PyEval_EvalFrameDefault(state, frame, throwing);
    collect(0);
    enter(before);
    return result;
}

static int stage_of_function(void *function) {
    size_t place = ((uintptr_t)function >> 4) % FUNCTIONS;
    while (known[place].function != NULL && known[place].function != function)
        place = (place + 1) % FUNCTIONS;
    if (known[place].function == NULL) {
        Dl_info info;
        int named = dladdr(function, &info) != 0 && info.dli_sname != NULL;
        PyObject *name = named ? PyUnicode_FromString(info.dli_sname) : NULL;
        known[place].stage = named ? ask(name) : INHERITED;
        Py_XDECREF(name);
        known[place].function = function;
    }
    return known[place].stage;
}

void __cyg_profile_func_enter(void *function, void *site) {
    (void)site;
    if (!installed || resolving)
        return;
    collect(0);
    stack[depth++ % DEEPEST] = current;
    int stage = stage_of_function(function);
    enter(stage == INHERITED ? current : stage);
}

void __cyg_profile_func_exit(void *function, void *site) {
    (void)function, (void)site;
    if (!installed || resolving || depth == 0)
        return;
    collect(0);
    enter(stack[--depth % DEEPEST]);
}

/* What bench/played.py calls. */
void marks_install(PyObject *asked) {
    Py_INCREF(asked);
    resolver = asked;
    extra = _PyEval_RequestCodeExtraIndex(NULL);
    _PyInterpreterState_SetEvalFrameFunc(PyInterpreterState_Get(), eval);
    installed = 1;
}

/* `stage` is counted from here on. */
void marks_count(int stage) {
    target = stage;
    enter(current);
}

/* Nobody any more; what was counted is written, under a name. */
void marks_write(const char *name) {
    target = NOBODY;
    collect(0);
    CALLGRIND_DUMP_STATS_AT(name);
}

void marks_begin(void) { CALLGRIND_START_INSTRUMENTATION; }

/* Between these two everything is counted, the harness too, as it runs without the hooks. */
void marks_off(void) {
    _PyInterpreterState_SetEvalFrameFunc(PyInterpreterState_Get(), NULL);
    installed = 0;
    collect(1);
}

void marks_on(void) {
    collect(0);
    _PyInterpreterState_SetEvalFrameFunc(PyInterpreterState_Get(), eval);
    installed = 1;
}
