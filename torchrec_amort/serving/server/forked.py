"""Found out once, by the process that others are forked from: which vectors this processor has.

Inductor runs a program for each kind before it loads the first package, more than half of the time until a process that
is started anew answers.
"""

from torch._inductor.cpu_vec_isa import valid_vec_isa_list

valid_vec_isa_list()
