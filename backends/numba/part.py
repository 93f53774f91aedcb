"""A compiler for functions that only kernels call.

Numba optimises every function and turns it into machine code, and does so again wherever the function is called: code
five calls deep goes through LLVM six times. What is compiled here is kept as it was lowered, linked into the kernels
that call it, and optimised there, once.
"""

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NopythonTypeInference


class _Nowhere:
    """The code generator of a part, whose environment has no address yet."""

    def __init__(self, codegen):
        self._codegen = codegen

    def __getattr__(self, name):
        return getattr(self._codegen, name)

    def set_env(self, env_name, env):
        """Left to the kernel."""


class _PartLibrary(JITCodeLibrary):
    """Code without an entry of its own. Where a version of Numba lacks one of these hooks, it compiles for longer."""

    @property
    def codegen(self):
        """As in any library, but that environments are not placed."""
        return _Nowhere(self._codegen)

    def _optimize_final_module(self):
        """Left to the kernel."""

    def _finalize_final_module(self):
        """No machine code."""
        self._finalized = True

    def get_pointer_to_function(self, name):
        """There is none: 0, as for any symbol that a library does not define."""
        self._ensure_finalized()
        return 0


@register_pass(mutates_CFG=False, analysis_only=True)
class _ChooseLibrary(FunctionPass):
    """Before lowering: where the code goes."""

    _name = "choose_part_library"

    def __init__(self):
        FunctionPass.__init__(self)

    def run_pass(self, state):
        name = state.func_id.func_qualname
        state.library = _PartLibrary(state.targetctx.codegen(), name)
        state.library.enable_object_caching()
        return True


class PartCompiler(CompilerBase):
    """Numba's own compiler, but for the library."""

    def define_pipelines(self):
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_ChooseLibrary, NopythonTypeInference)
        passes.finalize()
        return [passes]
