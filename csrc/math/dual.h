// A number with its derivatives with respect to two inputs. A loss written with it once yields its
// value and its gradient, and the two cannot disagree. T is float on CUDA and double on the CPU.
#pragma once

#include <cmath>

#include "host_device.h"

namespace rlhf_fast {

template <class T>
struct Dual {
  T value;
  T d_first;
  T d_second;

  RLHF_FAST_HD Dual(T value = T(0), T d_first = T(0), T d_second = T(0))
      : value(value), d_first(d_first), d_second(d_second) {}

  // f(x), given f(value) and f'(value). A slope of 0 silences an infinite derivative.
  RLHF_FAST_HD Dual map(T y, T slope) const { return {y, slope * d_first, slope * d_second}; }
};

template <class T>
RLHF_FAST_HD Dual<T> operator+(Dual<T> a, Dual<T> b) {
  return {a.value + b.value, a.d_first + b.d_first, a.d_second + b.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator-(Dual<T> a, Dual<T> b) {
  return {a.value - b.value, a.d_first - b.d_first, a.d_second - b.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.value * b.value, a.value * b.d_first + b.value * a.d_first,
          a.value * b.d_second + b.value * a.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator-(Dual<T> a) {
  return {-a.value, -a.d_first, -a.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator+(Dual<T> a, T b) {
  return {a.value + b, a.d_first, a.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator-(Dual<T> a, T b) {
  return {a.value - b, a.d_first, a.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator-(T a, Dual<T> b) {
  return {a - b.value, -b.d_first, -b.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator*(T a, Dual<T> b) {
  return {a * b.value, a * b.d_first, a * b.d_second};
}
template <class T>
RLHF_FAST_HD Dual<T> operator/(Dual<T> a, T b) {
  return {a.value / b, a.d_first / b, a.d_second / b};
}

template <class T>
RLHF_FAST_HD T sigmoid_of(T x) {
  const T e = std::exp(x < T(0) ? x : -x);
  const T small = e / (T(1) + e);
  return x < T(0) ? small : T(1) / (T(1) + e);
}

template <class T>
RLHF_FAST_HD Dual<T> sigmoid(Dual<T> x) {
  const T s = sigmoid_of(x.value);
  return x.map(s, s * sigmoid_of(-x.value));
}
// log(1 + e^x), so -log(sigmoid(x)) is softplus(-x)
template <class T>
RLHF_FAST_HD Dual<T> softplus(Dual<T> x) {
  const bool is_positive = x.value > T(0);
  const T e = std::exp(is_positive ? -x.value : x.value);
  const T tail = std::log1p(e);
  return x.map(is_positive ? x.value + tail : tail, (is_positive ? T(1) : e) / (T(1) + e));
}
template <class T>
RLHF_FAST_HD Dual<T> exp(Dual<T> x) {
  const T y = std::exp(x.value);
  return x.map(y, y);
}
template <class T>
RLHF_FAST_HD Dual<T> square(Dual<T> x) {
  return x.map(x.value * x.value, T(2) * x.value);
}
// max(x, 0); its slope at 0 is 0, as in PyTorch. NaN stays NaN.
template <class T>
RLHF_FAST_HD Dual<T> relu(Dual<T> x) {
  return x.value <= T(0) ? Dual<T>() : x;
}
// min(x, limit), with slope 0 above
template <class T>
RLHF_FAST_HD Dual<T> at_most(Dual<T> x, T limit) {
  return x.value > limit ? Dual<T>(limit) : x;
}
// log(1 - e^x) for x < 0
template <class T>
RLHF_FAST_HD Dual<T> log1mexp(Dual<T> x) {
  const T y = x.value < T(-0.6931471805599453) ? std::log1p(-std::exp(x.value))
                                               : std::log(-std::expm1(x.value));
  return x.map(y, T(1) - T(1) / -std::expm1(x.value));
}

}  // namespace rlhf_fast
