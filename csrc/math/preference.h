// The preference losses, one struct each: the value alone, its gradient follows (see dual.h).
//
// A score is log pi(y) - log ref(y), or log pi(y) without a reference, over tokens if the loss
// takes means, after the f-divergence's transformation. c and r are the scores of the chosen and
// the rejected response, b is beta, h = b * (c - r) - margin, p the probability that the chosen one
// really wins, sp(x) = log(1 + e^x), s the sigmoid.
#pragma once

#include "dual.h"
#include "rlhf_fast/preference_loss.h"

namespace rlhf_fast {

// One item as its loss sees it.
template <class T>
struct PreferencePair {
  Dual<T> chosen, rejected;
  bool has_chosen = true, has_rejected = true;  // an unpaired response is one of the two
  T beta;
  T margin;
  T target;     // p before label smoothing
  T smoothing;  // probability that the label is flipped
  T baseline;
  const PreferenceSettings* settings;

  RLHF_FAST_HD Dual<T> h() const { return beta * (chosen - rejected) - margin; }
  RLHF_FAST_HD T p() const { return target * (T(1) - smoothing) + (T(1) - target) * smoothing; }
};

// DPO, arXiv 2305.18290, equation 7: sp(-h). Label smoothing: conservative DPO by the same authors;
// targets: soft labels, as in arXiv 2405.14103. The margin: arXiv 2402.10571 (ODPO). Without a
// reference it is CPO's term of preference, arXiv 2401.08417, equation 3, or with means SimPO,
// arXiv 2405.14734, equation 6.
struct Sigmoid {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    const T p = x.p();
    Dual<T> total;
    if (p != T(0)) total = p * softplus(-x.h());
    if (p != T(1)) total = total + (T(1) - p) * softplus(x.h());
    return total;
  }
};

// Robust DPO, arXiv 2403.00409, section 3.1: ((1 - e) sp(-h) - e sp(h)) / (1 - 2e), e = label
// smoothing.
struct Robust {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    const T e = x.smoothing;
    const Dual<T> clean = (T(1) - e) * softplus(-x.h()) - e * softplus(x.h());
    return clean / (T(1) - T(2) * e);
  }
};

// Hinge on the normalised likelihood, arXiv 2309.06657, equation 10: max(0, 1 - h); its gamma is b.
struct Hinge {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    return relu(T(1) - x.h());
  }
};

// SLiC-HF, arXiv 2305.10425, equation 1: max(0, margin - (c - r)) without a reference. Beta scales
// rewards only.
struct Slic {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    return relu(x.margin - (x.chosen - x.rejected));
  }
};

// IPO, arXiv 2310.12036, equation 17: (h / b - (2p - 1) / (2b))^2.
struct Ipo {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    return square((x.h() - (x.p() - T(0.5))) / x.beta);
  }
};

// EXO, arXiv 2402.00856, equation 16: KL of (s(h), s(-h)) from (1 - e, e), e = label smoothing.
struct Exo {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    const Dual<T> h = x.h();
    const T log_win = std::log1p(-x.smoothing), log_loss = std::log(x.smoothing);
    return sigmoid(h) * (-softplus(-h) - log_win) + sigmoid(-h) * (-softplus(h) - log_loss);
  }
};

// DPO-Positive, arXiv 2402.13228, equation 3: sp(-(h - b * penalty * max(0, -c))).
struct DpoPositive {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    return softplus((x.beta * T(x.settings->penalty)) * relu(-x.chosen) - x.h());
  }
};

// DiscoPOP, arXiv 2406.08414, equation 5: (1 - m) sp(-h) + m e^-h, m = s(h / tau). The product
// m e^-h is taken as one exponential: its factors may be 0 and infinite.
struct DiscoPop {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    const Dual<T> h = x.h(), sharp = h / T(x.settings->temperature);
    return sigmoid(-sharp) * softplus(-h) + exp(-h - softplus(-sharp));
  }
};

// Cal-DPO, arXiv 2412.14516, equation 10: sp(-(c - r)) + (c - 1 / (2b))^2 + (r + 1 / (2b))^2:
// calibrated scores, whose logistic term has no beta. The authors' program
// (github.com/tengxiao1/Cal-DPO, dpo_loss) has the same terms, with half the weight on both
// squares.
struct CalDpo {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    const T target = T(0.5) / x.beta;
    return softplus(x.rejected - x.chosen) + square(x.chosen - target) +
           square(x.rejected + target);
  }
};

// APO-down, arXiv 2408.06266, equation 8: s(b c) + s(-h).
struct ApoDown {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    return sigmoid(x.beta * x.chosen) + sigmoid(-x.h());
  }
};

// ORPO's odds ratio, arXiv 2403.07691, equations 4 and 7, times its lambda (beta): c and r are mean
// log-probs, log odds(x) = x - log(1 - e^x). Probabilities of 1 are lowered to 1 - 1e-6.
struct Orpo {
  template <class T>
  RLHF_FAST_HD static Dual<T> log_odds(Dual<T> score) {
    const Dual<T> x = at_most(score, T(-1e-6));
    return x - log1mexp(x);
  }
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    return x.beta * softplus(log_odds(x.rejected) - log_odds(x.chosen));
  }
};

// Negative mean log-prob of the chosen response.
struct Sft {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    return -x.chosen;
  }
};

// Losses that are one part for a chosen and one for a rejected response.
template <class Parts>
struct Separable {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const PreferencePair<T>& x) {
    Dual<T> total;
    if (x.has_chosen) total = T(x.settings->chosen_weight) * Parts::chosen(x, x.chosen);
    if (x.has_rejected) {
      total = total + T(x.settings->rejected_weight) * Parts::rejected(x, x.rejected);
    }
    return total;
  }
};

// KTO, arXiv 2402.01306, equation 7: s(-b (c - baseline)), s(b (r - baseline)).
struct Kto : Separable<Kto> {
  template <class T>
  RLHF_FAST_HD static Dual<T> chosen(const PreferencePair<T>& x, Dual<T> c) {
    return sigmoid(x.beta * (x.baseline - c));
  }
  template <class T>
  RLHF_FAST_HD static Dual<T> rejected(const PreferencePair<T>& x, Dual<T> r) {
    return sigmoid(x.beta * (r - x.baseline));
  }
};

// BCO, arXiv 2404.04656, section 4: sp(-b (c - baseline)), sp(b (r - baseline)); b * baseline is
// its delta.
struct Bco : Separable<Bco> {
  template <class T>
  RLHF_FAST_HD static Dual<T> chosen(const PreferencePair<T>& x, Dual<T> c) {
    return softplus(x.beta * (x.baseline - c));
  }
  template <class T>
  RLHF_FAST_HD static Dual<T> rejected(const PreferencePair<T>& x, Dual<T> r) {
    return softplus(x.beta * (r - x.baseline));
  }
};

// APO-zero, arXiv 2408.06266, equation 7: s(-b c), s(b r).
struct ApoZero : Separable<ApoZero> {
  template <class T>
  RLHF_FAST_HD static Dual<T> chosen(const PreferencePair<T>& x, Dual<T> c) {
    return sigmoid(-(x.beta * c));
  }
  template <class T>
  RLHF_FAST_HD static Dual<T> rejected(const PreferencePair<T>& x, Dual<T> r) {
    return sigmoid(x.beta * r);
  }
};

// NCA for pairs, arXiv 2402.05369, table 1: sp(-b c) + sp(b c) / 2, sp(b r) / 2.
struct Nca : Separable<Nca> {
  template <class T>
  RLHF_FAST_HD static Dual<T> chosen(const PreferencePair<T>& x, Dual<T> c) {
    return softplus(-(x.beta * c)) + T(0.5) * softplus(x.beta * c);
  }
  template <class T>
  RLHF_FAST_HD static Dual<T> rejected(const PreferencePair<T>& x, Dual<T> r) {
    return T(0.5) * softplus(x.beta * r);
  }
};

// SPPO, arXiv 2405.00675, equation 4.7, eta = 1/b: (c - (p - 1/2) / b)^2, (r + (p - 1/2) / b)^2.
// p is 1 for hard labels; for soft ones the win rate that a preference model gives.
struct Sppo : Separable<Sppo> {
  template <class T>
  RLHF_FAST_HD static Dual<T> chosen(const PreferencePair<T>& x, Dual<T> c) {
    return square(c - (x.p() - T(0.5)) / x.beta);
  }
  template <class T>
  RLHF_FAST_HD static Dual<T> rejected(const PreferencePair<T>& x, Dual<T> r) {
    return square(r + (x.p() - T(0.5)) / x.beta);
  }
};

// f-divergence scores f'(t) of a log-ratio log t, arXiv 2309.16240, up to constants that
// cancel in c - r. Exponents are held below 80, so that float holds the result.
template <class T>
RLHF_FAST_HD Dual<T> divergence_score(const PreferenceSettings& s, Dual<T> log_ratio) {
  const T power = T(s.alpha) - T(1);
  switch (s.divergence) {
    case Divergence::kForwardKl: return T(1) - exp(at_most(-log_ratio, T(80)));
    case Divergence::kJensenShannon: return T(0.6931471805599453) - softplus(-log_ratio);
    case Divergence::kAlpha:
      if (power < T(1e-6) && power > T(-1e-6)) return log_ratio;  // the limit
      return (exp(at_most(power * log_ratio, T(80))) - T(1)) / power;
    case Divergence::kReverseKl: break;
  }
  return log_ratio;
}

}  // namespace rlhf_fast
