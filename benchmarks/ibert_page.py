"""The words of ibert.md; the figures in braces are measured by ibert.py."""

SETTING = """\
Both models hold the same random weights (seed {seed}; hidden size {hidden_size}, {num_hidden_layers} layers,
{num_attention_heads} heads, {intermediate_size} inside; weights four times the usual size, gammas from 0.5 to 1.5).
I-BERT tracked its ranges over {forwards} training-mode forwards of 4 texts, dropout 0; figures are of one other batch
of 16 texts of 24 tokens, every second one half padding. Our model is the RoBERTa with these weights under rules that
mirror I-BERT's widths: rows of weights by max-abs at 8 bits, activations -128..127, tables per tensor, sums of
embeddings 16 bits, sums before LayerNorm 22, polynomials for exp and GELU. Its scales are I-BERT's, to the last bit:

| our site | I-BERT's module |
|---|---|
| sums of embeddings (`add:2`, `add:3`) | `embeddings_act1`, first and second call (one range for both) |
| LayerNorm of the embeddings | `embeddings.output_activation` |
| `query`, `key`, `value` | `query_activation`, `key_activation`, `value_activation` |
| probabilities | `softmax`, step 1/256 |
| context (`matmul:1`) | `attention.self.output_activation` |
| sums (`output/add`) | `attention.output.ln_input_act`, `output.ln_input_act` |
| LayerNorm of the attention | `pre_intermediate_act`, the second of two roundings |
| GELU | `pre_output_act`, the second of two roundings |
| LayerNorm of the layer | `output.output_activation` |
| GELU's input, the head | none: I-BERT's GELU reads the accumulator (ours 22 bits of it), its head is float |

Scores are no site: in both they are exact products of the codes of Q and K."""

CAUSES = """\
* **The scale of a layer's input.** In transformers the encoder hands every layer the scale of the embeddings' output,
  not that of the layer before. From the second layer on the codes that enter Q, K and V are then no integers (the
  simulation divides and multiplies by the same wrong scale, so the values survive), the bias lies on another grid, and
  the residual is rounded to the wrong 8-bit grid before it is added: up to {wrong} steps of 22 bits where it was
  {right} without. An integer kernel that took the same scales would compute something else. (Known: transformers
  issue 26738, I-BERT issue 10.)
* **float32.** Repairing it changes next to nothing: with these sizes accumulators stay below 2**24 (at more than 1,040
  inputs they may pass it), and where exp and LayerNorm pass it, 8 bits of the result hardly show it. One case is plain:
  a lone key whose exponential is at the end of its 16 bits gets 256/256, since float32 rounds 2**32 - 4 up; in integers
  that is 255/256, which is also what ours gives.
* **Weights at +127.** `SymmetricQuantFunction` clamps to -127..126 on a scale that is the maximum over 127: {cut:.0f} %
  of the rows lose a step of their largest weight, and so do tables whose largest entry is positive. That is all there
  is between Q, K, V of the two; sums of 22 bits show it as thousands of steps.
* **Rounding twice.** I-BERT rounds both terms of a sum to its grid and adds; we add, then round: one step apart.
  Behind the attention's LayerNorm and behind GELU it rounds to 8 bits twice, on two ranges tracked apart: one 8-bit
  step on every seventh code of GELU, most of what is different at both.
* **Probabilities rounded down.** A row of I-BERT's sums to {their_rows:.3f} on average, one of ours to {our_rows:.3f}:
  its context is too small by that share, always in the same direction.
* **16 bits for the exponential.** Its range is tracked in units of the squared score step, which itself moves while
  ranges are tracked; afterwards the largest exponential is {exp_low:.2f} to {exp_high:.2f} times the range, by layer.
  In the layers above 1 the largest probability is cut, by up to 4 steps of 1/256; in the one below 1 nothing is.
* **LayerNorm.** A whole-number mean, deviations that drop up to {norm_shift:.0f} bits, no eps, floors of the factor, of
  the result and of beta / gamma: together one 8-bit step on 3 % of the codes. (beta / gamma has no value at gamma 0;
  our gain and offset are apart.)
* **Constants rounded down, 14 bits dropped.** No effect at the score and accumulator steps of this model (1e-4); the
  table of coarse steps shows where it starts. Ours lie on fixed grids (2**-14 for exp, 2**-12 for erf) at any step.
* **Masks.** Added as a float in I-BERT, read as true and false in ours; both give masked keys code 0.

What remains after all repairs is our own distance from the functions: see `docs/integer_errors.md`."""

COARSE = """\
A score or accumulator has a step of about 1e-4, so I-BERT is safe where it stands in its model; on 8-bit codes (steps
of 1e-2 and more) its GELU breaks: 1 / scale of the erf, rounded down, is then a small whole number."""

CONCLUSIONS = """\
* Fed the same codes on the same scales, ours is nowhere further from the exact function than I-BERT, on average or at
  most. The context is equal code for code as shipped; all products and sums are, once four causes are repaired.
* End to end ours is nearer to the float model at every hidden state, by a quarter at the last one. Most of that is the
  floor of the probabilities. After all repairs I-BERT is as far from float as ours. The logits of an untrained model
  rank nothing.
* Where I-BERT has the edge: its GELU reads the whole accumulator, ours in `W8E8A8-int` 8 bits of it, through an exact
  table. The last column shows that this costs nothing here: the polynomial itself is up to 0.018 from GELU. And its
  head stays float: the last two rows tell what our 8 bits add.
* Told the right scales, I-BERT's hidden states come a little nearer to the float model; its logits do not.
* Not shown: trained models (training adapts weights to a bias such as the floor), larger sizes, outliers, speed."""
