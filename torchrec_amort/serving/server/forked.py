"""Found out once, by the process that others are forked from: which vectors this processor has.

Inductor runs a program for each kind before it loads the first package, more than half of the time until a process that
is started anew answers.
"""

from contextlib import suppress

from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch._inductor.exc import InvalidCxxCompiler

# Packages are loaded without a compiler, too.
with suppress(InvalidCxxCompiler):
    valid_vec_isa_list()
