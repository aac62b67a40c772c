"""Training beside other work: a product over two threads waits for the slower, so it pays to leave a core
that something else has taken."""
import ctypes, os, time
import torch


def busy():
    """Processes that are running now, this one left out; 0 where the system does not say"""
    if not os.path.exists("/proc/stat"): return 0
    with open("/proc/stat") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("procs_running")) - 1


def take_free(most):
    """Use the cores that nothing else uses, at most `most`, at least one."""
    samples = []
    for _ in range(3):
        time.sleep(.004)
        samples.append(busy())
    torch.set_num_threads(max(1, min(most, os.cpu_count() - min(samples))))


def keep_memory():
    """Freed tensors stay with the process (glibc): fresh pages cost as much as the work done on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt: mallopt(-1, 2**31 - 1), mallopt(-3, 2**30)      # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
