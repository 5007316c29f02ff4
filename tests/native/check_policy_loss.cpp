// Runs every policy loss on the CPU and on emulated CUDA, at every ratio level and with everything
// that can be given, so that each branch is reached. They must agree with each other, and the
// gradient with the loss's change between two nearby inputs.
#include <memory>

#include "rlhf_fast/policy_loss.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

namespace {

const char* const kNames[] = {
#define RLHF_FAST_NAME(name, formula, level) #name,
    RLHF_FAST_POLICY_LOSSES(RLHF_FAST_NAME)
#undef RLHF_FAST_NAME
};
constexpr int64_t kOffsets[] = {0, 40, 40, 41, 100};
constexpr int64_t kSequences = 4, kTokens = 100;

struct Batch {
  std::vector<float> logps, old_logps, advantages, ref_logps, sampling_logps, entropy;
  std::shared_ptr<bool[]> mask{new bool[kTokens]};

  explicit Batch(std::mt19937& random) {
    std::uniform_real_distribution<float> uniform(-2.0f, -0.5f);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    for (int64_t t = 0; t < kTokens; ++t) {
      logps.push_back(uniform(random));
      old_logps.push_back(logps[t] + normal(random));
      ref_logps.push_back(logps[t] + normal(random));
      sampling_logps.push_back(old_logps[t] + normal(random));
      advantages.push_back(50.0f * normal(random));
      entropy.push_back(-uniform(random));
      mask[t] = random() % 4;
    }
  }
};

struct Result {
  float loss;
  std::vector<float> metrics = std::vector<float>(kNumPolicyMetrics);
  std::vector<float> d_logps = std::vector<float>(kTokens, NAN);
  std::vector<float> d_entropy = std::vector<float>(kTokens, NAN);
};

Result run(const Batch& b, const PolicyParams& params, bool everything, bool cuda) {
  PolicyLossInputs in;
  in.sequences = {kSequences, 0, kTokens, kOffsets};
  in.logps = b.logps.data();
  in.old_logps = b.old_logps.data();
  in.advantages = b.advantages.data();
  in.params = params;
  in.aggregation.denominator = everything ? Denominator::kSequences : Denominator::kTokens;
  in.aggregation.mean_over_tokens = everything;
  if (everything) {
    in.mask = b.mask.get();
    in.ref_logps = b.ref_logps.data();
    in.sampling_logps = b.sampling_logps.data();
    in.entropy = b.entropy.data();
  }
  Result r;
  std::vector<float> lengths(kSequences), partials(kSequences * kNumPolicyMetrics);
  float scale = NAN;
  unsigned ticket = 0;
  const PolicyLossOutputs out{
      &r.loss,        r.metrics.data(), r.d_logps.data(), everything ? r.d_entropy.data() : nullptr,
      lengths.data(), partials.data(),  &scale,           &ticket};
  cuda ? policy_loss_cuda(in, out, {}) : policy_loss_cpu(in, out, 2);
  for (float& d : r.d_logps) d *= scale;
  expect_near(ticket, 0.0, 0.0, "ticket for the next launch", cuda);
  return r;
}

}  // namespace

int check_policy_loss(bool few) {
  std::mt19937 random(1);
  for (int loss = 0; loss < int(sizeof kNames / sizeof *kNames); ++loss) {
    for (int level = 0; level < 3; ++level) {
      for (const bool everything : {false, true}) {
        if (few && (level == 1 || (loss % 6 && loss != int(PolicyLoss::gspo)))) continue;
        PolicyParams p;
        p.loss = static_cast<PolicyLoss>(loss);
        p.ratio_level = static_cast<RatioLevel>(level);
        p.kl_estimator = KlEstimator::kK3;
        p.epsilon_low = p.epsilon_high = 0.9f;  // a clip would disturb the differences
        p.dual_clip = p.kl_bound = INFINITY;
        p.log_ratio_bound = 20.0f;
        p.sapo_temperature_pos = 1.0f;
        p.sapo_temperature_neg = 1.05f;
        p.vespo_k_pos = p.vespo_k_neg = 2.0f;
        p.vespo_lambda_pos = p.vespo_lambda_neg = 2.0f;
        p.dro_beta = 1.0f;
        p.kl_coef = everything ? 0.5f : 0.0f;
        p.entropy_coef = 0.1f;
        p.sampling_log_low = -INFINITY;
        p.sampling_log_high = 3.0f;
        Batch b(random);
        const Result cpu = run(b, p, everything, false), cuda = run(b, p, everything, true);
        expect_near(cpu.loss, cuda.loss, 1e-5, "loss on CPU and CUDA", loss);
        for (int m = 0; m < kNumPolicyMetrics; ++m) {
          expect_near(cpu.metrics[m], cuda.metrics[m], 1e-4, "metric on CPU and CUDA", loss);
        }
        double change = 0.0;  // of the loss, over a small step forth and back
        Batch forth(b), back(b);
        for (int64_t t = 0; t < kTokens; ++t) {
          expect_near(cpu.d_logps[t], cuda.d_logps[t], 1e-5, "gradient on CPU and CUDA", loss);
          const float step = t % 2 ? 1e-3f : -2e-3f;
          forth.logps[t] += step;
          back.logps[t] -= step;
          change += 2.0 * double(step) * cpu.d_logps[t];
        }
        // cispo, vespo and a_lol hold their weight constant, gspo_token all but its own token.
        const bool exact = p.loss == PolicyLoss::ppo || p.loss == PolicyLoss::sapo ||
                           p.loss == PolicyLoss::gspo || p.loss == PolicyLoss::rloo ||
                           p.loss == PolicyLoss::gmpo || p.loss == PolicyLoss::reinforce;
        if (exact) {
          const double moved = double(run(forth, p, everything, false).loss) -
                               double(run(back, p, everything, false).loss);
          expect_near(moved, change, 1e-5, "change of the loss", loss);
        }
      }
    }
  }
  return report("policy_loss");
}
