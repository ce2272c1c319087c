"""The seccomp filter of the sandbox: it denies system calls that no program under test needs and with which attacks on kernels begin.

Namespaces and user ids protect without it; it removes the kernel code that has most often been the way around them.
"""

import errno
import functools
import os
import socket

from megatron_aspo.common.errors import UserError

DENIED = (
    # memory of other processes
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd"),
    # namespaces, mounts, roots
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "open_by_handle_at", "name_to_handle_at", "quotactl", "quotactl_fd", "swapon", "swapoff", "acct"),
    # large, recent or privileged parts of the kernel
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "fanotify_init", "inotify_init"),
    *("inotify_init1", "add_key", "request_key", "keyctl", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
    *("reboot", "iopl", "ioperm", "modify_ldt", "personality", "syslog", "lookup_dcookie", "vmsplice", "move_pages", "migrate_pages"),
    *("mbind", "set_mempolicy", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname", "vhangup"),
    # memory that counts towards no process's limits and outlives the process
    *("memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "semget", "semop", "semtimedop", "semctl", "msgget", "msgsnd", "msgrcv"),
    *("msgctl", "mq_open", "mq_unlink", "mlock", "mlock2", "mlockall"),
)
"""Denied with EPERM; a name that this machine's libseccomp does not know is skipped."""
NAMESPACE_FLAGS = (0x10000000, 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000, 0x2000000)
"""CLONE_NEWUSER, NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET, NEWCGROUP."""
TERMINAL_INPUT = (0x5412, 0x541C)
"""ioctl TIOCSTI and TIOCLINUX, which type into the terminal."""


@functools.cache
def load_pyseccomp():
    """Return the binding of libseccomp. Raises UserError if the binding or the library is missing."""
    try:
        import pyseccomp
    except ImportError as error:
        raise UserError("the code sandbox needs the package pyseccomp; install it: pip install pyseccomp") from error
    except RuntimeError as error:
        raise UserError("the code sandbox needs libseccomp; install it (Debian, Ubuntu: apt install libseccomp2)") from error
    return pyseccomp


def make_filter() -> int:
    """Return a descriptor of an anonymous file with the filter's BPF program. Raises UserError as `load_pyseccomp` does."""
    seccomp = load_pyseccomp()
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    for name in DENIED:
        try:
            rules.add_rule(seccomp.ERRNO(errno.EPERM), name)
        except OSError:  # newer than the library, or of another architecture
            continue
    for flag in NAMESPACE_FLAGS:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    # Its flags are in memory, which a filter cannot read; the C library then falls back to clone.
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(seccomp.ERRNO(errno.EAFNOSUPPORT), "socket", seccomp.Arg(0, seccomp.NE, socket.AF_UNIX))
    for request in TERMINAL_INPUT:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFFFFFF, request))
    descriptor = os.memfd_create("seccomp")
    with open(os.dup(descriptor), "wb") as file:
        rules.export_bpf(file)
    return descriptor
