"""How kernels that follow each other overlap on the GPU."""

from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def previous_kernel(_semantic=None):
    """Waits until the kernel before has written everything, and lets the next one start.

    Kernels for 9.0 are launched while the one before still runs (programmatic dependent launch), and what stands above
    this call overlaps with its end. It may read weights, tables and counts, and what was written two kernels before or earlier; it
    must write nothing. Every program calls this, before it may return. Elsewhere it is nothing.
    """
    if _semantic is not None and _semantic.builder.options.arch == "sm90":
        gdc_wait(_semantic=_semantic)
        gdc_launch_dependents(_semantic=_semantic)


previous_kernel.__triton_builtin__ = True  # the compiler passes _semantic, the interpreter does not
