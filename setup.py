"""Builds the operators of ``csrc/`` into ``nasfcos/_C.so``; everything else is in pyproject.toml.

The package installs without them too and then runs their plain PyTorch versions: where no compiler
is found, where the compilation fails, or where torch is not importable while building (pip's build
isolation; use ``--no-build-isolation``).

Environment:
    NASFCOS_CUDA=1    compile the CUDA kernels (needs nvcc); unset: where a GPU and nvcc are found,
                      and without them should that fail
    NASFCOS_CUDA=0    do not
    NASFCOS_NO_EXT=1  compile nothing
    NASFCOS_STRICT=1  a failing compilation fails the installation
    TORCH_CUDA_ARCH_LIST, MAX_JOBS  as for any PyTorch extension

To compile the CUDA sources without installing them, on any machine that has nvcc:
    CUDA_HOME=/usr/local/cuda NASFCOS_CUDA=1 NASFCOS_STRICT=1 TORCH_CUDA_ARCH_LIST="9.0" \\
        python setup.py build_ext --build-temp build/cuda/temp --build-lib build/cuda/lib
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

# Paths of sources must be relative for setuptools; pip runs this file from its folder.
CSRC = Path("csrc")


def say(message: str) -> None:
    print(f"\n*** nasfcos: {message}\n", file=sys.stderr, flush=True)


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "")
    return None if value == "" else value != "0"


def extension_arguments() -> dict:
    if flag("NASFCOS_NO_EXT"):
        say("NASFCOS_NO_EXT is set: the operators are not compiled, plain PyTorch will serve.")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if flag("NASFCOS_STRICT"):
            raise
        say(
            f"torch cannot be imported while building ({error}), so the operators are not compiled "
            "and plain PyTorch will serve, which is slower. To compile them, install torch first "
            "and then run `pip install --no-build-isolation -e .`"
        )
        return {}

    def extension(with_cuda: bool) -> Extension:
        sources = sorted(CSRC.glob("*.cpp")) + sorted(CSRC.glob("cpu/*.cpp"))
        # ATen's parallel_for is a header template over OpenMP, and serial without -fopenmp.
        openmp = ["-fopenmp"] if sys.platform == "linux" else []
        flags = {"cxx": ["-O3", *openmp, "-fno-math-errno", "-fno-trapping-math", "-g0"]}
        make = cpp_extension.CppExtension
        if with_cuda:
            sources += sorted(CSRC.glob("cuda/*.cu"))
            flags["nvcc"] = ["-O3"]
            make = cpp_extension.CUDAExtension
        say(f"compiling the operators for the CPU{' and CUDA' if with_cuda else ''}.")
        return make(
            "nasfcos._C",
            [str(source) for source in sources],
            extra_compile_args=flags,
            extra_link_args=openmp,
            depends=[str(header) for header in CSRC.rglob("*.h")],
        )

    asked = flag("NASFCOS_CUDA")
    found = torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            # Everything that can be wrong with a compiler ends here, whatever its exception.
            try:
                if asked is None and found and not flag("NASFCOS_STRICT"):
                    self.run_without_cuda_if_need_be()
                else:
                    super().run()
            except (Exception, SystemExit) as error:
                if flag("NASFCOS_STRICT"):
                    raise
                say(
                    f"compiling the operators failed ({type(error).__name__}: {error}). The "
                    "package is installed all the same, and plain PyTorch will serve, which is "
                    "slower. The compiler's messages are above (pip shows them with -v)."
                )

        def run_without_cuda_if_need_be(self) -> None:
            options = dict(vars(self))  # which a run that fails does not put back
            try:
                super().run()
            except (Exception, SystemExit) as error:
                say(
                    f"compiling for CUDA failed ({type(error).__name__}: {error}). Plain PyTorch "
                    "will serve on the GPU; see CUDA_HOME in INSTALL.md."
                )
                vars(self).update(options)
                # What finalize_options has added to the extension stays.
                vars(self.extensions[0]).update(vars(extension(with_cuda=False)))
                super().run()

        def copy_file(self, infile, outfile, *args, **kwargs):
            # A process that has the old library mapped must keep it: replace, never overwrite.
            fresh = f"{outfile}.new"
            result = super().copy_file(infile, fresh, *args, **kwargs)
            if os.path.exists(fresh):
                os.replace(fresh, outfile)
            return result

    # No Python interface: the library registers itself with torch, for any version of Python.
    command = BuildExtension.with_options(no_python_abi_suffix=True)
    modules = [extension(found if asked is None else asked)]
    return {"ext_modules": modules, "cmdclass": {"build_ext": command}}


setup(**extension_arguments())
