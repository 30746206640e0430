// Strikes at one file-system call of the process that arms it: with a signal before, amid or after the call, or with an
// error instead of it. Preloaded (LD_PRELOAD), it sees what Python, torch and safetensors' Rust ask of the C library.
//
// Only calls on paths that begin with `prefix` are events; each gets a line in the log: number, function, the rest of
// the path, and STRUCK where it was struck. A write that is struck amid leaves its first half. A rename by syscall(), as
// safetensors does it, is not seen; the calls before and after it are.
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <string>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

enum When { BEFORE, AMID, AFTER, LATER };
enum Kind { READ, OPEN, CREATE, WRITE, SYNC, RENAME, CHANGE };  // CHANGE: of names, sizes and modes

struct Plan {
    std::string prefix, needle;
    int log = -1;
    long event = 0;  // counted from 1, of the events that have the needle in their line; 0: only note
    int signal = 0, error = 0;  // one of them
    int when = BEFORE;
    bool stays = false;  // the error meets every later call that it can meet, too
    long delay_us = 0;  // of LATER
    pid_t pid = 0;  // data workers are forked with the plan, but it is not theirs
} plan;

std::atomic<long> events{0}, chosen{0};
std::atomic<bool> struck{false}, owed{false};  // owed: a write was cut short, and the next one meets the error

bool can_meet(int error, Kind kind) {
    if (error == ENOSPC) return kind == CREATE || kind == WRITE || kind == RENAME || (kind == SYNC && !struck);
    if (error == EROFS) return kind != READ && kind != SYNC;
    return true;
}

std::string path_of(int fd) {
    char link[64], target[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, target, sizeof target);
    return length < 0 ? "" : std::string(target, length);
}

std::string path_at(int directory, const char* path) {
    if (path == nullptr || path[0] == '/') return path == nullptr ? "" : path;
    return path_of(directory) + "/" + path;  // AT_FDCWD finds no such file, and the run has whole paths there
}

size_t half_of(size_t size) { return size > 1 ? size / 2 : size; }

void note(long number, std::string line, bool struck_here) {
    line = std::to_string(number) + " " + line + (struck_here ? " STRUCK\n" : "\n");
    syscall(SYS_write, plan.log, line.data(), line.size());
}

void* kill_later(void*) {
    timespec wait{plan.delay_us / 1000000, plan.delay_us % 1000000 * 1000};
    nanosleep(&wait, nullptr);
    kill(plan.pid, plan.signal);
    return nullptr;
}

void send_signal() {
    pthread_t thread;
    if (plan.when == LATER) {
        if (pthread_create(&thread, nullptr, kill_later, nullptr) == 0) pthread_detach(thread);
    } else {
        kill(plan.pid, plan.signal);
    }
}

// `call` does it; `half` does the first half, where a call has one.
template <class Call, class Half>
long event(const char* name, Kind kind, const std::string& path, Call call, Half half) {
    int saved = errno;
    bool ours = plan.log >= 0 && path.compare(0, plan.prefix.size(), plan.prefix) == 0 && getpid() == plan.pid;
    errno = saved;
    if (!ours) return call();
    std::string line = std::string(name) + " " + path.substr(plan.prefix.size());
    long number = ++events, nth = line.find(plan.needle) == std::string::npos ? 0 : ++chosen;
    bool fits = plan.error == 0 || can_meet(plan.error, kind);
    bool due = plan.event > 0 && fits && (nth >= plan.event || (struck && plan.stays));
    if (owed && kind == WRITE && owed.exchange(false)) {
        due = true;
    } else if (due && (struck || owed)) {
        due = struck && plan.stays;
    } else if (due && plan.error && plan.when == AMID && kind == WRITE) {
        owed = true;
        note(number, line + " (half)", false);
        return half();
    }
    if (due) struck = true;
    note(number, line, due);
    if (!due) return call();
    if (plan.error) {
        errno = plan.error;
        return -1;
    }
    if (plan.when == AFTER || plan.when == AMID) {
        long result = plan.when == AFTER ? call() : half();
        saved = errno;
        send_signal();
        errno = saved;
        return result;
    }
    send_signal();
    return call();
}

template <class Call>
long event(const char* name, Kind kind, const std::string& path, Call call) {
    return event(name, kind, path, call, call);
}

template <class F>
F real(F, const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

#define REAL(name) static auto next = real(&name, #name)

Kind kind_of(const std::string& path, int flags) {
    struct stat about;
    if (flags & O_CREAT) return fstatat(AT_FDCWD, path.c_str(), &about, 0) == 0 ? OPEN : CREATE;
    return (flags & O_ACCMODE) == O_RDONLY ? READ : OPEN;
}

mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }

}  // namespace

extern "C" {

// The calling process's plan; returns 0, or the errno with which the log could not be opened.
int strike_arm(const char* prefix, const char* needle, const char* log, long at, int signal, int error, int when,
               int stays, long delay_us) {
    int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0) return errno;
    plan = {prefix, needle, file, at, signal, error, when, stays != 0, delay_us, getpid()};
    return 0;
}

#define OPEN_PATH(name)                                                                             \
    int name(const char* path, int flags, ...) {                                                    \
        REAL(name);                                                                                 \
        va_list rest;                                                                               \
        va_start(rest, flags);                                                                      \
        mode_t mode = mode_of(flags, rest);                                                         \
        va_end(rest);                                                                               \
        std::string whole = path_at(AT_FDCWD, path);                                                \
        return event("open", kind_of(whole, flags), whole, [&] { return next(path, flags, mode); }); \
    }
OPEN_PATH(open)
OPEN_PATH(open64)

#define OPEN_AT(name)                                                                                      \
    int name(int directory, const char* path, int flags, ...) {                                            \
        REAL(name);                                                                                        \
        va_list rest;                                                                                      \
        va_start(rest, flags);                                                                             \
        mode_t mode = mode_of(flags, rest);                                                                \
        va_end(rest);                                                                                      \
        std::string whole = path_at(directory, path);                                                      \
        return event("open", kind_of(whole, flags), whole, [&] { return next(directory, path, flags, mode); }); \
    }
OPEN_AT(openat)
OPEN_AT(openat64)

ssize_t write(int fd, const void* data, size_t size) {
    REAL(write);
    if (fd < 3) return next(fd, data, size);
    return event("write", WRITE, path_of(fd), [&] { return next(fd, data, size); },
                 [&] { return next(fd, data, half_of(size)); });
}

#define PWRITE(name)                                                                              \
    ssize_t name(int fd, const void* data, size_t size, off_t at) {                               \
        REAL(name);                                                                               \
        return event("pwrite", WRITE, path_of(fd), [&] { return next(fd, data, size, at); },      \
                     [&] { return next(fd, data, half_of(size), at); });                               \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const iovec* parts, int count) {
    REAL(writev);
    return event("writev", WRITE, path_of(fd), [&] { return next(fd, parts, count); });
}

#define ON_FILE(name, kind)                                                  \
    int name(int fd) {                                                       \
        REAL(name);                                                          \
        return event(#name, kind, path_of(fd), [&] { return next(fd); });    \
    }
ON_FILE(fsync, SYNC)
ON_FILE(fdatasync, SYNC)

#define TRUNCATE(name)                                                                \
    int name(int fd, off_t size) {                                                    \
        REAL(name);                                                                   \
        return event("ftruncate", CHANGE, path_of(fd), [&] { return next(fd, size); }); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ON_PATH(name)                                                                            \
    int name(const char* path) {                                                                 \
        REAL(name);                                                                              \
        return event(#name, CHANGE, path_at(AT_FDCWD, path), [&] { return next(path); });        \
    }
ON_PATH(unlink)
ON_PATH(rmdir)

#define WITH_MODE(name, kind)                                                                    \
    int name(const char* path, mode_t mode) {                                                    \
        REAL(name);                                                                              \
        return event(#name, kind, path_at(AT_FDCWD, path), [&] { return next(path, mode); });    \
    }
WITH_MODE(mkdir, CREATE)
WITH_MODE(chmod, CHANGE)

int unlinkat(int directory, const char* path, int flags) {
    REAL(unlinkat);
    return event("unlinkat", CHANGE, path_at(directory, path), [&] { return next(directory, path, flags); });
}

int mkdirat(int directory, const char* path, mode_t mode) {
    REAL(mkdirat);
    return event("mkdirat", CREATE, path_at(directory, path), [&] { return next(directory, path, mode); });
}

int fchmodat(int directory, const char* path, mode_t mode, int flags) {
    REAL(fchmodat);
    return event("fchmodat", CHANGE, path_at(directory, path), [&] { return next(directory, path, mode, flags); });
}

int rename(const char* from, const char* to) {
    REAL(rename);
    return event("rename", RENAME, path_at(AT_FDCWD, from), [&] { return next(from, to); });
}

int renameat(int directory, const char* from, int other, const char* to) {
    REAL(renameat);
    return event("renameat", RENAME, path_at(directory, from), [&] { return next(directory, from, other, to); });
}

}  // extern "C"
