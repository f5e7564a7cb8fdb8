"""How kernels that follow each other overlap on the GPU."""

import triton.language as tl
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


def together(*values, _semantic=None):
    """The values, halves or float32 that have been loaded, but none of them before all loads are on their way.

    Without it the compiler takes each of them through shared memory, with a barrier, to the threads that need it before it loads the next
    one, and their latencies add up. With it all of them are in registers or shared memory at once, for which not every GPU has room.
    """
    if _semantic is None:
        return values
    if _semantic.builder.options.arch != "sm90":
        return tl.tuple(values)

    _semantic.debug_barrier()  # the assembler moves loads behind the stores of others that have arrived, but not across this

    def there(value):
        kind, pack = ("f", 1) if value.dtype == tl.float32 else ("r", 2)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", f"={kind},{kind}", [value], value.dtype, is_pure=False, pack=pack, _semantic=_semantic)

    return tl.tuple([there(value) for value in values])


together.__triton_builtin__ = True


def finished(*values, _semantic=None):
    """The float32 values, none of which is left to be computed behind previous_kernel().

    Products that need nothing of the kernel before are there for the time until it has ended, but the assembler moves them behind
    the wait: nothing tells it not to. Here a second wait depends on them, which is never executed but for one number in 2^32, and then does no harm.
    """
    if _semantic is None:
        return values
    if _semantic.builder.options.arch != "sm90":
        return tl.tuple(values)
    wait = "{ .reg .pred p; .reg .b32 t; xor.b32 t, $4, $6; setp.eq.u32 p, t, 0x7fc01234; @p griddepcontrol.wait; "
    code = wait + " ".join(f"mov.b32 ${k}, ${k + 4};" for k in range(4)) + " }"
    constraints = ",".join(["=r"] * 4 + ["r"] * 4)
    made = []
    for value in values:
        bits = _semantic.bitcast(value, tl.int32)
        bits = tl.inline_asm_elementwise(code, constraints, [bits], tl.int32, is_pure=False, pack=4, _semantic=_semantic)
        made.append(_semantic.bitcast(bits, tl.float32))
    return tl.tuple(made)


finished.__triton_builtin__ = True
