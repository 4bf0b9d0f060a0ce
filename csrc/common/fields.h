// Binds C++ functions to Python, with keyword arguments. The fields of a struct are keyword arguments too, so neither
// side depends on the order of the fields in the other. For a function
//
//   struct Rows { float* x; int64_t stride_x; };
//   void scale_rows(const Rows& rows, float factor, DType dtype, int threads);
//
// a source file of the module says
//
//   FASTLM_FIELDS(Rows) {                                             // at global scope, with the struct's full name
//     FIELD(x);
//     FIELD(stride_x);
//   }
//   FASTLM_BIND(scale_rows, "rows", "factor", "dtype", "threads");    // in the namespace of scale_rows
//
// and Python calls
//
//   scale_rows(x=x, stride_x=x.stride(0), factor=2.0, dtype=0, threads=1)
//
// FASTLM_BIND names every parameter of the function. Python does not see the name of a struct ("rows"), only its
// fields. A call has to give every argument, by keyword; a missing or unknown name is a TypeError. A function has at
// most 64 arguments. The GIL is released while the function runs.
//
// How Python's values become C++ values (Convert):
//   pointer            an object with data_ptr(), such as a tensor; an integer address; None for null
//   number, bool       the Python number; an integer that does not fit is an OverflowError
//   enum               its integer code
//   array, vector      a list or tuple, which keeps its items alive during the call
//   FASTLM_TUPLE(T)    a struct as one argument: a tuple of its members in the macro's order; None sets all to zero
//
// The calls cost less than pybind11's: layer_norm_fwd takes 1.3 µs for 17 arguments by name, where pybind11 took 1.8 µs
// for 22 by position (one loaded core; LOG.md, 2026-11-29). This file needs no torch.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastlm::python {

struct Failed {};  // thrown where a Python exception is set

[[noreturn]] inline void fail(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw Failed{};
}

// Owns a reference to the end of a scope. Throws Failed for a null pointer.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object) throw Failed{};
  }
  ~Owned() { Py_DECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// ---- values: Convert<T>::from(object, value) sets `value` from a Python object

template <class T, class = void>
struct Convert;

template <class T>
struct Convert<T*> {
  static void from(PyObject* object, T*& value) {
    if (object == Py_None) {
      value = nullptr;
    } else if (PyLong_CheckExact(object)) {
      value = static_cast<T*>(PyLong_AsVoidPtr(object));
    } else {
      static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
      const Owned address(PyObject_CallMethodNoArgs(object, data_ptr));
      value = static_cast<T*>(PyLong_AsVoidPtr(address.get()));
    }
    if (!value && PyErr_Occurred()) throw Failed{};
  }
};

template <class T>
struct Convert<const T*> {
  static void from(PyObject* object, const T*& value) {
    T* pointer = nullptr;
    Convert<T*>::from(object, pointer);
    value = pointer;
  }
};

template <>
struct Convert<bool> {
  static void from(PyObject* object, bool& value) {
    if (object != Py_True && object != Py_False) fail(PyExc_TypeError, "expected a bool");
    value = object == Py_True;
  }
};

template <class T>
struct Convert<T, std::enable_if_t<std::is_integral_v<T> && !std::is_same_v<T, bool>>> {
  static void from(PyObject* object, T& value) {
    if constexpr (std::is_unsigned_v<T>) {
      const Owned number(PyNumber_Index(object));  // PyLong_AsLongLong does this itself
      const unsigned long long wide = PyLong_AsUnsignedLongLong(number.get());
      if (wide == ~0ull && PyErr_Occurred()) throw Failed{};
      if (wide > std::numeric_limits<T>::max()) fail(PyExc_OverflowError, "an integer is too large for its field");
      value = T(wide);
    } else {
      const long long wide = PyLong_AsLongLong(object);
      if (wide == -1 && PyErr_Occurred()) throw Failed{};
      if (wide < std::numeric_limits<T>::min() || wide > std::numeric_limits<T>::max())
        fail(PyExc_OverflowError, "an integer is too large for its field");
      value = T(wide);
    }
  }
};

template <class T>
struct Convert<T, std::enable_if_t<std::is_floating_point_v<T>>> {
  static void from(PyObject* object, T& value) {
    const double wide = PyFloat_AsDouble(object);
    if (wide == -1.0 && PyErr_Occurred()) throw Failed{};
    value = T(wide);
  }
};

template <class T>
struct Convert<T, std::enable_if_t<std::is_enum_v<T>>> {
  static void from(PyObject* object, T& value) {
    std::underlying_type_t<T> code{};
    Convert<std::underlying_type_t<T>>::from(object, code);
    value = T(code);
  }
};

// Calls f(index, item) for each item of a list or tuple. It must have `size` items; -1: any number. The tensors that
// another iterable makes would not outlive this function.
template <class F>
void each_item(PyObject* object, Py_ssize_t size, F f) {
  if (!PyList_Check(object) && !PyTuple_Check(object)) fail(PyExc_TypeError, "expected a list or tuple");
  const Owned items(PySequence_Fast(object, ""));
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.get());
  if (size >= 0 && n != size)
    fail(PyExc_ValueError, "expected " + std::to_string(size) + " items, got " + std::to_string(n));
  for (Py_ssize_t i = 0; i < n; ++i) f(i, PySequence_Fast_GET_ITEM(items.get(), i));
}

template <class T>
struct Convert<std::vector<T>> {
  static void from(PyObject* object, std::vector<T>& values) {
    values.clear();
    each_item(object, -1, [&](Py_ssize_t, PyObject* item) {
      values.emplace_back();
      Convert<T>::from(item, values.back());
    });
  }
};

template <class T, size_t N>
struct Convert<T[N]> {
  static void from(PyObject* object, T (&values)[N]) {
    each_item(object, N, [&](Py_ssize_t i, PyObject* item) { Convert<T>::from(item, values[i]); });
  }
};

template <class T, size_t N>
struct Convert<std::array<T, N>> {
  static void from(PyObject* object, std::array<T, N>& values) {
    each_item(object, N, [&](Py_ssize_t i, PyObject* item) { Convert<T>::from(item, values[i]); });
  }
};

// Sets a struct from a tuple of its members, in the order of `members`. None sets all members to zero.
template <class T, auto... members>
struct FromTuple {
  static void from(PyObject* object, T& value) {
    value = T{};
    if (object == Py_None) return;
    static constexpr void (*set[])(T&, PyObject*) = {&set_member<members>...};
    each_item(object, sizeof...(members), [&](Py_ssize_t i, PyObject* item) { set[i](value, item); });
  }

 private:
  template <auto member>
  static void set_member(T& value, PyObject* item) {
    Convert<std::decay_t<decltype(value.*member)>>::from(item, value.*member);
  }
};

#define FASTLM_TUPLE(T, ...) \
  template <>                \
  struct fastlm::python::Convert<T> : fastlm::python::FromTuple<T, __VA_ARGS__> {}

// ---- fields: Fields<T>::each(value, f) calls f(name, member) for each FIELD of a struct

template <class T>
struct Fields : std::false_type {};

#define FASTLM_FIELDS(T)                              \
  template <>                                         \
  struct fastlm::python::Fields<T> : std::true_type { \
    template <class F>                                \
    static void each(T& value, F& f);                 \
  };                                                  \
  template <class F>                                  \
  void fastlm::python::Fields<T>::each(T& value, F& f)

#define FIELD(name) f(#name, value.name)

// ---- results

inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* to_python(double value) { return PyFloat_FromDouble(value); }
template <class A, class B>
PyObject* to_python(const std::pair<A, B>& value) {
  const Owned first(to_python(value.first)), second(to_python(value.second));
  return PyTuple_Pack(2, first.get(), second.get());
}

// ---- calls

// One keyword argument. Its value is stored `offset` bytes into the tuple of the function's arguments.
struct Slot {
  PyObject* name;
  ptrdiff_t offset;
  void (*set)(void* place, PyObject* object);
};

class Slots {
 public:
  explicit Slots(const char* base) : base_(base) {}

  template <class T>
  void operator()(const char* name, T& member) {
    if constexpr (Fields<T>::value) {
      Fields<T>::each(member, *this);
    } else {
      all.push_back({PyUnicode_InternFromString(name), reinterpret_cast<const char*>(&member) - base_,
                     [](void* place, PyObject* object) { Convert<T>::from(object, *static_cast<T*>(place)); }});
    }
  }

  std::vector<Slot> all;

 private:
  const char* base_;
};

constexpr size_t kMostSlots = 64;

// Stores the keyword arguments of a call at `base`, each in the slot of its name.
inline void fill(const std::vector<Slot>& slots, char* base, const char* function, PyObject* const* values,
                 Py_ssize_t positional, PyObject* names) {
  if (positional) fail(PyExc_TypeError, std::string(function) + ": expected keyword arguments alone");
  uint64_t filled = 0;
  const size_t n = slots.size(), count = names ? size_t(PyTuple_GET_SIZE(names)) : 0;
  for (size_t i = 0, next = 0; i < count; ++i, ++next) {
    PyObject* const name = PyTuple_GET_ITEM(names, Py_ssize_t(i));
    size_t tried = 0;  // a call usually names the fields in their order
    for (; tried < n && slots[(next + tried) % n].name != name; ++tried) {
    }
    if (tried == n)  // a name that is not interned
      for (tried = 0; tried < n && PyUnicode_Compare(slots[(next + tried) % n].name, name) != 0; ++tried) {
      }
    if (tried == n) {
      PyErr_Format(PyExc_TypeError, "%s: no argument %U", function, name);
      throw Failed{};
    }
    next = (next + tried) % n;
    try {
      slots[next].set(base + slots[next].offset, values[i]);
    } catch (const Failed&) {
      PyObject *type, *error, *trace;
      PyErr_Fetch(&type, &error, &trace);
      PyErr_NormalizeException(&type, &error, &trace);  // `error` may be null
      PyErr_Format(type, "%s: %U: %S", function, name, error);
      Py_XDECREF(type), Py_XDECREF(error), Py_XDECREF(trace);
      throw;
    }
    filled |= uint64_t(1) << next;
  }
  if (count == n && filled == (n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1)) return;
  std::string missing;
  for (size_t i = 0; i < n; ++i)
    if (!(filled >> i & 1)) missing += std::string(missing.empty() ? "" : ", ") + PyUnicode_AsUTF8(slots[i].name);
  fail(PyExc_TypeError, std::string(function) + ": missing " + missing);
}

template <class F>
struct Signature;
template <class R, class... A>
struct Signature<R (*)(A...)> {
  using Result = R;
  using Values = std::tuple<std::decay_t<A>...>;
};

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// One bound function. `bind` sets `name`; `add_methods` sets `slots`.
template <auto function>
struct Bound {
  using Result = typename Signature<decltype(function)>::Result;
  using Values = typename Signature<decltype(function)>::Values;
  static inline const char* name = nullptr;
  static inline std::vector<Slot> slots;

  static void describe(const std::vector<const char*>& names) {
    Values sample{};
    Slots found(reinterpret_cast<const char*>(&sample));
    size_t i = 0;
    std::apply([&](auto&... value) { (found(names.at(i++), value), ...); }, sample);
    if (found.all.size() > kMostSlots) throw std::logic_error("more than 64 arguments");
    slots = std::move(found.all);
  }

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
    try {
      Values arguments{};
      fill(slots, reinterpret_cast<char*>(&arguments), name, values, positional, keywords);
      if constexpr (std::is_void_v<Result>) {
        {
          const WithoutGil released;
          std::apply(function, arguments);
        }
        Py_RETURN_NONE;
      } else {
        Result result{};
        {
          const WithoutGil released;
          result = std::apply(function, arguments);
        }
        return to_python(result);
      }
    } catch (const Failed&) {
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

// A function that a source file has bound. `add_methods` adds it to the module.
struct Method {
  PyMethodDef definition;
  void (*describe)(const std::vector<const char*>&);
  std::vector<const char*> names;
};
// The lists of one module. FASTLM_BINDINGS defines them, in the file that has PYBIND11_MODULE.
std::vector<Method>& methods();
std::vector<std::pair<const char*, int64_t>>& constants();

#define FASTLM_BINDINGS                                                       \
  std::vector<fastlm::python::Method>& fastlm::python::methods() {            \
    static std::vector<Method> all;                                           \
    return all;                                                               \
  }                                                                           \
  std::vector<std::pair<const char*, int64_t>>& fastlm::python::constants() { \
    static std::vector<std::pair<const char*, int64_t>> all;                  \
    return all;                                                               \
  }                                                                           \
  static_assert(true)

template <auto function>
bool bind(const char* name, std::vector<const char*> names) {
  Bound<function>::name = name;
  const auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Bound<function>::call));
  methods().push_back(
      {{name, call, METH_FASTCALL | METH_KEYWORDS, nullptr}, &Bound<function>::describe, std::move(names)});
  return true;
}

#define FASTLM_BIND(function, ...) \
  [[maybe_unused]] static const bool bound_##function = fastlm::python::bind<function>(#function, {__VA_ARGS__})

// An integer that Python reads as an attribute of the module.
#define FASTLM_CONSTANT(name, value) \
  [[maybe_unused]] static const bool constant_##name = (fastlm::python::constants().emplace_back(#name, value), true)

// Adds all bound functions to a module. The list must not grow afterwards: Python keeps the addresses of its entries.
inline void add_methods(PyObject* module) {
  for (Method& method : methods()) {
    method.describe(method.names);
    PyObject* const function = PyCFunction_New(&method.definition, nullptr);
    if (!function || PyModule_AddObject(module, method.definition.ml_name, function) < 0) throw Failed{};
  }
  for (const auto& [name, value] : constants()) {
    if (PyModule_AddObject(module, name, PyLong_FromLongLong(value)) < 0) throw Failed{};
  }
}

}  // namespace fastlm::python
