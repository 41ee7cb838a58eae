"""Moving optimizer state in from the authors' code and from torch's Adam, and out to the authors' code.

What each keeps for a parameter, in the paper's symbols (Algorithms 1 and 2; ^ marks what is corrected for bias):

    this package        exp_avg m~, grad_mean u, grad_var v - u^2, weight_sum w, max_denom max sqrt(v), step
    authors' MAdam      exp_avg_grad m~, exp_avg u~, exp_avg_sq v~, total_w w, max_exp_avg_sq max(sqrt(v) + eps), step;
                        their BERT code has the step in the group, and total_w may be one number
    authors' LaMAdam    update_est, g_est u~, g_sq_est v~, total_w w, step, update_lr_bc (fairseq: update_avg_lr)
    torch Adam, AdamW   exp_avg m~, exp_avg_sq v~, max_exp_avg_sq max v~, step; w is 1 - beta2^t

The authors' LaMAdam averages lr * direction in update_est and lr in update_lr_bc, and steps by the quotient; our
exp_avg is that quotient times 1 - alpha^t. All of them add eps beside sqrt(v), our eps_mode="adam".

The functions take and return what `Optimizer.state_dict` returns, and change nothing of what they are given. They
compute in float64 on the tensors' own devices and round once, to float32 (float64 where the source is float64). NaN and
infinity stay what they are.
"""

from .adam import from_adam
from .authors import from_authors, to_authors
from .own import to_state_dtype

__all__ = ["from_adam", "from_authors", "to_authors", "to_state_dtype"]
