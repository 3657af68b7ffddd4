#include <pybind11/stl.h>

#include "bindings.hpp"

namespace tqai::python {
namespace {

// PyErr_SetString, for every kind that tqai throws.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const IndexError& error) {
    py::set_error(PyExc_IndexError, error.what());
  } catch (const UnsupportedError& error) {
    py::set_error(PyExc_NotImplementedError, error.what());
  } catch (const MemoryLimitError& error) {
    py::set_error(PyExc_MemoryError, error.what());
  } catch (const FileError& error) {
    // With a number, Python finds the kind of OSError: FileNotFoundError and so on.
    const int number = error.code().default_error_condition().value();
    py::set_error(PyExc_OSError, py::make_tuple(number, error.what()));
  } catch (const Error& error) {
    py::set_error(PyExc_ValueError, error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled part of tqai: caches and quantisers on addresses and numbers.";
  module.attr("__version__") = TQAI_VERSION;
  py::register_exception_translator(translate);

  module.def(
      "available_levels",
      [] {
        std::vector<std::string> names;
        for (const Level level : available_levels()) names.emplace_back(tqai::name_of(level));
        return names;
      },
      "Kernel levels of this build and processor, slowest first.");
  module.def(
      "default_level", [] { return std::string(tqai::name_of(default_level())); },
      "The level that new caches take: the fastest, or the one that TQAI_LEVEL names.");
  module.def("openmp_threads", &openmp_threads,
             "Threads that a call takes at most; 0: built without OpenMP.");
  bind_basis(module);
  bind_cache(module);
  bind_codebook(module);
  bind_files(module);
  bind_quantizers(module);
  bind_sequences(module);
}

}  // namespace tqai::python
