"""How kernels that follow each other overlap on the GPU."""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def previous_kernel(_semantic=None):
    """Waits until the kernel before has written everything, and lets the next one start.

    Kernels for 9.0 are launched while the one before still runs (programmatic dependent launch), and what stands above
    this call overlaps with its end. It may read weights, tables and counts, and what was written two kernels before or earlier (three, if the
    kernel before calls :func:`next_kernel`); it must write nothing. Every program calls this, before it may return. Elsewhere it is nothing.
    """
    if _semantic is not None and _semantic.builder.options.arch == "sm90":
        gdc_wait(_semantic=_semantic)
        gdc_launch_dependents(_semantic=_semantic)


previous_kernel.__triton_builtin__ = True  # the compiler passes _semantic, the interpreter does not


def next_kernel(_semantic=None):
    """Lets the next kernel start before this one waits, for one whose own beginning would else be late: it may then start before the kernel before
    this one has ended, and read early only what was written three kernels before or earlier.

    It pays for a next kernel that has much to do before it waits and few weights to load, which would stand in the way of those waited for.
    """
    if _semantic is not None and _semantic.builder.options.arch == "sm90":
        gdc_launch_dependents(_semantic=_semantic)


next_kernel.__triton_builtin__ = True


def at_once(*values, _semantic=None):
    """The values, halves or float32, none of which goes through shared memory to the threads that need it before all of them are there."""
    if _semantic is None:
        return values
    if _semantic.builder.options.arch != "sm90":
        return tl.tuple(values)

    def there(value):
        kind, pack = ("f", 1) if value.dtype == tl.float32 else ("r", 2)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", f"={kind},{kind}", [value], value.dtype, is_pure=False, pack=pack, _semantic=_semantic)

    return tl.tuple([there(value) for value in values])


at_once.__triton_builtin__ = True


def together(*values, _semantic=None):
    """The values, halves or float32 that have been loaded, but none of them before all loads are on their way.

    Without it the compiler takes each of them through shared memory, with a barrier, to the threads that need it before it loads the next
    one, and their latencies add up. With it all of them are in registers or shared memory at once, for which not every GPU has room.
    """
    if _semantic is not None and _semantic.builder.options.arch == "sm90":
        _semantic.debug_barrier()  # the assembler moves loads behind the stores of others that have arrived, but not across this
    return at_once(*values, _semantic=_semantic)


together.__triton_builtin__ = True


def finished(*values, _semantic=None):
    """The float32 values, none of which is left to be computed behind previous_kernel().

    Products that need nothing of the kernel before are there for the time until it has ended, but the assembler moves them behind
    the wait: nothing tells it not to. Here a second wait depends on them, which is never executed but for one number in 2^32, and then does no harm.
    """
    if _semantic is None:
        return values
    if _semantic.builder.options.arch == "sm90":
        code = "{ .reg .pred p; .reg .b32 t; mov.b32 t, $1; " + "".join(f"xor.b32 t, t, ${k + 1}; " for k in range(1, len(values)))
        code += "setp.eq.u32 p, t, 0x7fc01234; @p griddepcontrol.wait; mov.b32 $0, t; }"
        constraints = ",".join(["=r", *["f"] * len(values)])
        tl.inline_asm_elementwise(code, constraints, values, tl.int32, is_pure=False, pack=1, _semantic=_semantic)
    return tl.tuple(values)


finished.__triton_builtin__ = True
