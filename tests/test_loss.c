/* Losses against PyTorch and a naive form in long double; targets; the gradient of a batch against
 * differences and a naive dense network. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "pathkernel_under_test.h"

typedef struct constant {
    pk_loss loss;
    size_t outputs;
    pk_real f[3], y[3];
    double value;
    double gradient[3];
} constant;

/* PyTorch 2.15, float64: python3 loss_constants.py, which reads
 *   import torch, torch.nn.functional as F
 *   torch.set_default_dtype(torch.float64)
 *   label = lambda y: y.argmax()[None] if y.max() == 1 else y[None]
 *   LOSSES = {
 *       "squared": lambda f, y: ((f - y) ** 2).sum() / 2,
 *       "mean_squared": F.mse_loss,
 *       "softmax_cross_entropy": lambda f, y: F.cross_entropy(f[None], label(y)),
 *       "logistic": F.binary_cross_entropy_with_logits,
 *       "nll": lambda f, y: F.nll_loss(f[None], label(y)) if y.max() == 1 else -(f * y).sum(),
 *       "huber": F.smooth_l1_loss,
 *       "hinge": lambda f, y: F.relu(1 - y * f)[0] if len(f) == 1 else F.multi_margin_loss(f[None], label(y)),
 *   }
 *   far, most = [800., -800., 0.], [1e300, -1e300, 0.]
 *   some = [.5, -1.25, 3.]
 *   PAIRS = {
 *       "squared mean_squared huber": [
 *           (some, [1, .25, -2]), ([1, -1, 0], [0, 0, 0]),
 *           ([1 + 2**-52, -1 - 2**-52, 1 - 2**-53], [0, 0, 0]),
 *           ([800, -800, 1e-300], [.1, 0, 0]), ([1e150, -1e150, 0], [0, 1, 0]), ([.7], [.2])],
 *       "huber": [(most, [0, 1, 0])],
 *       "softmax_cross_entropy": [
 *           (some, [0, 1, 0]), (some, [.2, .5, .3]), (some, [.4, 1.5, .3]), (far, [1, 0, 0]),
 *           (far, [0, 1, 0]), ([800, -800, 799], [.1, .2, .7]), (most, [1, 0, 0]), (most, [0, 0, 1]),
 *           ([1e300, 1e300, 0], [0, 1, 0]), ([2, 2, 2], [0, 0, 1]),
 *           ([-700.5, -700, -701], [0, 0, 1]), ([3], [1])],
 *       "logistic": [
 *           (some, [0, 1, 1]), (some, [.2, .5, .9]), (far, [1, 0, 1]), (far, [0, 1, .5]),
 *           (most, [1, 0, 1]), ([1e300, -1e300, 40], [0, 1, 0]), (most, [.25, .5, 1]), ([-.75], [1])],
 *       "nll": [
 *           ([-.5, -1.25, -3], [0, 1, 0]), ([-.5, -1.25, -3], [.2, .5, .3]), (most, [1, 0, 0]), ([-2], [1])],
 *       "hinge": [
 *           (some, [0, 1, 0]), (some, [0, 0, 1]), ([1, 0, 2], [1, 0, 0]), ([1, 0, 0], [1, 0, 0]),
 *           ([1 + 2**-50, 0, 2**-52], [1, 0, 0]), (far, [0, 1, 0]), (most, [1, 0, 0]), (most, [0, 0, 1]),
 *           ([1], [1]), ([-1], [-1]), ([.25], [1]), ([.25], [-1]), ([1e300], [-1])],
 *   }
 *   vector = lambda v: "{" + ", ".join(map(repr, v.tolist())) + "}"
 *   for names, pairs in PAIRS.items():
 *       for name in names.split():
 *           for f, y in pairs:
 *               f = torch.tensor(f, dtype=torch.float64, requires_grad=True)
 *               y = torch.tensor(y, dtype=torch.float64)
 *               value = LOSSES[name](f, y)
 *               value.backward()
 *               print("    {PK_%s, %d, %s, %s," % (name.upper(), len(f), vector(f), vector(y)))
 *               print("     %r, %s}," % (value.item(), vector(f.grad)))
 */
/* clang-format off */
static const constant constants[] = {
    {PK_SQUARED, 3, {0.5, -1.25, 3.0}, {1.0, 0.25, -2.0},
     13.75, {-0.5, -1.5, 5.0}},
    {PK_SQUARED, 3, {1.0, -1.0, 0.0}, {0.0, 0.0, 0.0},
     1.0, {1.0, -1.0, 0.0}},
    {PK_SQUARED, 3, {1.0000000000000002, -1.0000000000000002, 0.9999999999999999}, {0.0, 0.0, 0.0},
     1.5000000000000004, {1.0000000000000002, -1.0000000000000002, 0.9999999999999999}},
    {PK_SQUARED, 3, {800.0, -800.0, 1e-300}, {0.1, 0.0, 0.0},
     639920.005, {799.9, -800.0, 1e-300}},
    {PK_SQUARED, 3, {1e+150, -1e+150, 0.0}, {0.0, 1.0, 0.0},
     9.999999999999999e+299, {1e+150, -1e+150, 0.0}},
    {PK_SQUARED, 1, {0.7}, {0.2},
     0.12499999999999997, {0.49999999999999994}},
    {PK_MEAN_SQUARED, 3, {0.5, -1.25, 3.0}, {1.0, 0.25, -2.0},
     9.166666666666666, {-0.3333333333333333, -1.0, 3.333333333333333}},
    {PK_MEAN_SQUARED, 3, {1.0, -1.0, 0.0}, {0.0, 0.0, 0.0},
     0.6666666666666666, {0.6666666666666666, -0.6666666666666666, 0.0}},
    {PK_MEAN_SQUARED, 3, {1.0000000000000002, -1.0000000000000002, 0.9999999999999999}, {0.0, 0.0, 0.0},
     1.0000000000000002, {0.6666666666666667, -0.6666666666666667, 0.6666666666666665}},
    {PK_MEAN_SQUARED, 3, {800.0, -800.0, 1e-300}, {0.1, 0.0, 0.0},
     426613.33666666667, {533.2666666666667, -533.3333333333333, 6.666666666666667e-301}},
    {PK_MEAN_SQUARED, 3, {1e+150, -1e+150, 0.0}, {0.0, 1.0, 0.0},
     6.666666666666666e+299, {6.666666666666666e+149, -6.666666666666666e+149, 0.0}},
    {PK_MEAN_SQUARED, 1, {0.7}, {0.2},
     0.24999999999999994, {0.9999999999999999}},
    {PK_HUBER, 3, {0.5, -1.25, 3.0}, {1.0, 0.25, -2.0},
     1.875, {-0.16666666666666666, -0.3333333333333333, 0.3333333333333333}},
    {PK_HUBER, 3, {1.0, -1.0, 0.0}, {0.0, 0.0, 0.0},
     0.3333333333333333, {0.3333333333333333, -0.3333333333333333, 0.0}},
    {PK_HUBER, 3, {1.0000000000000002, -1.0000000000000002, 0.9999999999999999}, {0.0, 0.0, 0.0},
     0.5000000000000001, {0.3333333333333333, -0.3333333333333333, 0.33333333333333326}},
    {PK_HUBER, 3, {800.0, -800.0, 1e-300}, {0.1, 0.0, 0.0},
     532.9666666666667, {0.3333333333333333, -0.3333333333333333, 3.3333333333333334e-301}},
    {PK_HUBER, 3, {1e+150, -1e+150, 0.0}, {0.0, 1.0, 0.0},
     6.666666666666666e+149, {0.3333333333333333, -0.3333333333333333, 0.0}},
    {PK_HUBER, 1, {0.7}, {0.2},
     0.12499999999999997, {0.49999999999999994}},
    {PK_HUBER, 3, {1e+300, -1e+300, 0.0}, {0.0, 1.0, 0.0},
     6.666666666666667e+299, {0.3333333333333333, -0.3333333333333333, 0.0}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {0.5, -1.25, 3.0}, {0.0, 1.0, 0.0},
     4.341985780591969, {0.07487121456204028, -0.9869893337946298, 0.9121181192325896}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {0.5, -1.25, 3.0}, {0.2, 0.5, 0.3},
     2.716985780591969, {-0.12512878543795974, -0.4869893337946299, 0.6121181192325895}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {0.5, -1.25, 3.0}, {0.4, 1.5, 0.3},
     7.577368717302332, {-0.23528332796351142, -1.4713765343481857, 1.7066598623116969}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {800.0, -800.0, 0.0}, {1.0, 0.0, 0.0},
     0.0, {0.0, 0.0, 0.0}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {800.0, -800.0, 0.0}, {0.0, 1.0, 0.0},
     1600.0, {1.0, -1.0, 0.0}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {800.0, -800.0, 799.0}, {0.1, 0.2, 0.7},
     321.01326168751825, {0.6310585786300049, -0.2, -0.43105857863000485}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {1e+300, -1e+300, 0.0}, {1.0, 0.0, 0.0},
     0.0, {0.0, 0.0, 0.0}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {1e+300, -1e+300, 0.0}, {0.0, 0.0, 1.0},
     1e+300, {1.0, 0.0, -1.0}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {1e+300, 1e+300, 0.0}, {0.0, 1.0, 0.0},
     0.6931471805599453, {0.5, -0.5, 0.0}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {2.0, 2.0, 2.0}, {0.0, 0.0, 1.0},
     1.0986122886681098, {0.3333333333333333, 0.3333333333333333, -0.6666666666666667}},
    {PK_SOFTMAX_CROSS_ENTROPY, 3, {-700.5, -700.0, -701.0}, {0.0, 0.0, 1.0},
     1.6802696706417346, {0.3071958857184984, 0.506480391055654, -0.8136762767741524}},
    {PK_SOFTMAX_CROSS_ENTROPY, 1, {3.0}, {1.0},
     0.0, {0.0}},
    {PK_LOGISTIC, 3, {0.5, -1.25, 3.0}, {0.0, 1.0, 1.0},
     0.8415311390330739, {0.20748644373395153, -0.2590999537248971, -0.015808624392522213}},
    {PK_LOGISTIC, 3, {0.5, -1.25, 3.0}, {0.2, 0.5, 0.9},
     0.6998644723664071, {0.14081977706728485, -0.0924332870582304, 0.017524708940811113}},
    {PK_LOGISTIC, 3, {800.0, -800.0, 0.0}, {1.0, 0.0, 1.0},
     0.23104906018664842, {0.0, 0.0, -0.16666666666666666}},
    {PK_LOGISTIC, 3, {800.0, -800.0, 0.0}, {0.0, 1.0, 0.5},
     533.56438239352, {0.3333333333333333, -0.3333333333333333, 0.0}},
    {PK_LOGISTIC, 3, {1e+300, -1e+300, 0.0}, {1.0, 0.0, 1.0},
     0.23104906018664842, {0.0, 0.0, -0.16666666666666666}},
    {PK_LOGISTIC, 3, {1e+300, -1e+300, 40.0}, {0.0, 1.0, 0.0},
     6.666666666666667e+299, {0.3333333333333333, -0.3333333333333333, 0.3333333333333333}},
    {PK_LOGISTIC, 3, {1e+300, -1e+300, 0.0}, {0.25, 0.5, 1.0},
     4.166666666666667e+299, {0.25, -0.16666666666666666, -0.16666666666666666}},
    {PK_LOGISTIC, 1, {-0.75}, {1.0},
     1.1368710061148999, {-0.679178699175393}},
    {PK_NLL, 3, {-0.5, -1.25, -3.0}, {0.0, 1.0, 0.0},
     1.25, {0.0, -1.0, 0.0}},
    {PK_NLL, 3, {-0.5, -1.25, -3.0}, {0.2, 0.5, 0.3},
     1.625, {-0.2, -0.5, -0.3}},
    {PK_NLL, 3, {1e+300, -1e+300, 0.0}, {1.0, 0.0, 0.0},
     -1e+300, {-1.0, 0.0, 0.0}},
    {PK_NLL, 1, {-2.0}, {1.0},
     2.0, {-1.0}},
    {PK_HINGE, 3, {0.5, -1.25, 3.0}, {0.0, 1.0, 0.0},
     2.6666666666666665, {0.3333333333333333, -0.6666666666666666, 0.3333333333333333}},
    {PK_HINGE, 3, {0.5, -1.25, 3.0}, {0.0, 0.0, 1.0},
     0.0, {0.0, 0.0, 0.0}},
    {PK_HINGE, 3, {1.0, 0.0, 2.0}, {1.0, 0.0, 0.0},
     0.6666666666666666, {-0.3333333333333333, 0.0, 0.3333333333333333}},
    {PK_HINGE, 3, {1.0, 0.0, 0.0}, {1.0, 0.0, 0.0},
     0.0, {0.0, 0.0, 0.0}},
    {PK_HINGE, 3, {1.0000000000000009, 0.0, 2.220446049250313e-16}, {1.0, 0.0, 0.0},
     0.0, {0.0, 0.0, 0.0}},
    {PK_HINGE, 3, {800.0, -800.0, 0.0}, {0.0, 1.0, 0.0},
     800.6666666666666, {0.3333333333333333, -0.6666666666666666, 0.3333333333333333}},
    {PK_HINGE, 3, {1e+300, -1e+300, 0.0}, {1.0, 0.0, 0.0},
     0.0, {0.0, 0.0, 0.0}},
    {PK_HINGE, 3, {1e+300, -1e+300, 0.0}, {0.0, 0.0, 1.0},
     3.3333333333333335e+299, {0.3333333333333333, 0.0, -0.3333333333333333}},
    {PK_HINGE, 1, {1.0}, {1.0},
     0.0, {-0.0}},
    {PK_HINGE, 1, {-1.0}, {-1.0},
     0.0, {0.0}},
    {PK_HINGE, 1, {0.25}, {1.0},
     0.75, {-1.0}},
    {PK_HINGE, 1, {0.25}, {-1.0},
     1.25, {1.0}},
    {PK_HINGE, 1, {1e+300}, {-1.0},
     1e+300, {1.0}},
};
/* clang-format on */

/* A loss with options, one example: a label, or NUMBERS; value, gradient, and the Hessian's product with
 * (0.75, -1, 0.5); NAN: not compared. */
typedef struct optioned {
    const char *loss;
    pk_real f[3];
    int64_t label;
    double y[3], value, gradient[3], product[3];
} optioned;

enum { NUMBERS = 1000 };

/* PyTorch 2.15, float64, from the criteria of torch.nn with these options, reduction='sum' for those of classes and kl_div
 * and 'mean' for the others, by torch.autograd.grad and its derivative. */
/* clang-format off */
static const optioned with_options[] = {
    {"softmax_cross_entropy label_smoothing=0.1", {0.5, -1.25, 3.0}, 0, {0},
     2.5669857805919687, {-0.8584621187712931, -0.020322667127963205, 0.8787847858992562}, {0.018777565519597337, -0.019505614250658186, 0.0007280487310608669}},
    {"softmax_cross_entropy label_smoothing=0.1", {0.5, -1.25, 3.0}, 1, {0},
     4.141985780591969, {0.04153788122870695, -0.9203226671279632, 0.8787847858992562}, {0.018777565519597337, -0.019505614250658186, 0.0007280487310608669}},
    {"softmax_cross_entropy label_smoothing=0.1", {1000.0, -1000.0, 0.0}, 0, {0},
     100.0, {0.06666666666666665, -0.03333333333333333, -0.03333333333333333}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy label_smoothing=0.1", {1000.0, -1000.0, 0.0}, 1, {0},
     1900.0, {0.9666666666666667, -0.9333333333333333, -0.03333333333333333}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy label_smoothing=0.1", {1e-12, -3e-12, 0.0}, 0, {0},
     1.0986122886666099, {-0.5999999999994445, 0.2999999999992222, 0.3000000000002222}, {0.22222222222215743, -0.3611111111107037, 0.13888888888854628}},
    {"softmax_cross_entropy label_smoothing=0.1", {1e-12, -3e-12, 0.0}, 1, {0},
     1.0986122886702097, {0.30000000000055554, -0.6000000000007778, 0.3000000000002222}, {0.22222222222215743, -0.3611111111107037, 0.13888888888854628}},
    {"softmax_cross_entropy label_smoothing=0.1", {1000000000000.0, -1000000000000.0, 0.0}, 0, {0},
     100000000000.0, {0.06666666666666665, -0.03333333333333333, -0.03333333333333333}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy label_smoothing=0.1", {1000000000000.0, -1000000000000.0, 0.0}, 1, {0},
     1900000000000.0, {0.9666666666666667, -0.9333333333333333, -0.03333333333333333}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy label_smoothing=1", {0.5, -1.25, 3.0}, 1, {0},
     2.341985780591969, {-0.25846211877129305, -0.3203226671279632, 0.5787847858992563}, {0.018777565519597337, -0.019505614250658186, 0.0007280487310608669}},
    {"softmax_cross_entropy weight=0.5,2,1.25", {0.5, -1.25, 3.0}, 1, {0},
     8.683971561183938, {0.14974242912408056, -1.9739786675892597, 1.8242362384651791}, {0.037555131039194674, -0.03901122850131637, 0.0014560974621217338}},
    {"softmax_cross_entropy weight=0.5,2,1.25", {1000.0, -1000.0, 0.0}, 1, {0},
     4000.0, {2.0, -2.0, 0.0}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy weight=0.5,2,1.25", {1000000000000.0, -1000000000000.0, 0.0}, 1, {0},
     4000000000000.0, {2.0, -2.0, 0.0}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy label_smoothing=0.25 weight=0.5,2,1.25", {0.5, -1.25, 3.0}, 0, {0},
     1.8132402241569785, {-0.365192706655264, -0.1577218336504747, 0.5229145403057387}, {0.012909576294723163, -0.013410109797327504, 0.0005005335026043587}},
    {"softmax_cross_entropy label_smoothing=0.25 weight=0.5,2,1.25", {0.5, -1.25, 3.0}, NUMBERS, {0.2, 0.5, 0.3},
     4.318004826214856, {-0.01044313100677204, -0.8982077839877978, 0.9086509149945696}, {0.02664067108092872, -0.027673590218121297, 0.0010329191371926084}},
    {"softmax_cross_entropy label_smoothing=0.25 weight=0.5,2,1.25", {1000.0, -1000.0, 0.0}, 0, {0},
     437.5, {0.2708333333333333, -0.16666666666666666, -0.10416666666666666}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy label_smoothing=0.25 weight=0.5,2,1.25", {1000.0, -1000.0, 0.0}, NUMBERS, {0.2, 0.5, 0.3},
     2218.75, {1.302083333333333, -0.9166666666666666, -0.38541666666666663}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy ignore_index=-100", {0.5, -1.25, 3.0}, -100, {0},
     0.0, {0.0, 0.0, 0.0}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy ignore_index=-100", {0.5, -1.25, 3.0}, 1, {0},
     4.341985780591969, {0.07487121456204028, -0.9869893337946298, 0.9121181192325896}, {0.018777565519597337, -0.019505614250658186, 0.0007280487310608669}},
    {"softmax_cross_entropy label_smoothing=0.3 ignore_index=1 weight=0.5,2,1.25", {0.5, -1.25, 3.0}, 1, {0},
     0.0, {0.0, 0.0, 0.0}, {0.0, 0.0, 0.0}},
    {"softmax_cross_entropy label_smoothing=0.3 ignore_index=1 weight=0.5,2,1.25", {0.5, -1.25, 3.0}, 2, {0},
     1.089982225739961, {0.04358901820255036, -0.18373666724328733, 0.14014764904073695}, {0.023471956899496663, -0.024382017813322734, 0.000910060913826033}},
    {"nll ignore_index=2 weight=0.5,2,1.25", {0.5, -1.25, 3.0}, 1, {0},
     2.5, {0.0, -2.0, 0.0}, {0.0, 0.0, 0.0}},
    {"nll ignore_index=2 weight=0.5,2,1.25", {0.5, -1.25, 3.0}, 2, {0},
     0.0, {0.0, 0.0, 0.0}, {0.0, 0.0, 0.0}},
    {"logistic pos_weight=0.5,2,1.25", {0.5, -1.25, 3.0}, NUMBERS, {0.0, 1.0, 1.0},
     1.3462231121126769, {0.20748644373395153, -0.5181999074497942, -0.019760780490652774}, {0.058750928050398624, -0.11540319132833132, 0.009411804110606665}},
    {"logistic pos_weight=0.5,2,1.25", {0.5, -1.25, 3.0}, NUMBERS, {1.0, 0.0, 0.9},
     0.28282902637108676, {-0.0629234447996909, 0.07423337960843628, 0.013967768452493626}, {0.029375464025199312, -0.05770159566416566, 0.009223568028394533}},
    {"logistic pos_weight=0.5,2,1.25", {1000.0, -1000.0, 0.0}, NUMBERS, {0.0, 1.0, 1.0},
     1000.2888113252334, {0.3333333333333333, -0.6666666666666666, -0.20833333333333334}, {0.0, 0.0, 0.05208333333333333}},
    {"logistic pos_weight=0.5,2,1.25", {1000.0, -1000.0, 0.0}, NUMBERS, {1.0, 0.0, 0.9},
     0.28303509872864435, {0.0, 0.0, -0.1708333333333333}, {0.0, 0.0, 0.051041666666666666}},
    {"logistic pos_weight=0.5,2,1.25", {1e-12, -3e-12, 0.0}, NUMBERS, {0.0, 1.0, 1.0},
     0.9819585057944226, {0.16666666666675, -0.33333333333383336, -0.20833333333333334}, {0.0625, -0.16666666666666666, 0.05208333333333333}},
    {"logistic pos_weight=0.5,2,1.25", {1e-12, -3e-12, 0.0}, NUMBERS, {1.0, 0.0, 0.9},
     0.6296086890080336, {-0.08333333333329167, 0.16666666666641664, -0.1708333333333333}, {0.03125, -0.08333333333333333, 0.051041666666666666}},
    {"logistic pos_weight=0.5,2,1.25", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.0, 1.0, 1.0},
     1000000000000.2887, {0.3333333333333333, -0.6666666666666666, -0.20833333333333334}, {0.0, 0.0, 0.05208333333333333}},
    {"logistic pos_weight=0.5,2,1.25", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {1.0, 0.0, 0.9},
     0.28303509872864435, {0.0, 0.0, -0.1708333333333333}, {0.0, 0.0, 0.051041666666666666}},
    {"logistic pos_weight=3", {0.5, -1.25, 3.0}, NUMBERS, {0.0, 1.0, 1.0},
     1.8752087609791506, {0.20748644373395153, -0.7772998611746912, -0.0474258731775666}, {0.058750928050398624, -0.173104786992497, 0.022588329865456}},
    {"huber delta=0.25", {0.5, -1.25, 3.0}, NUMBERS, {0.4, 0.0, 5.5},
     0.29333333333333333, {0.033333333333333326, -0.08333333333333333, -0.08333333333333333}, {0.25, 0.0, 0.0}},
    {"huber delta=0.25", {0.5, -1.25, 3.0}, NUMBERS, {0.25, -1.0, 2.75},
     0.03125, {0.08333333333333333, -0.08333333333333333, 0.08333333333333333}, {0.0, 0.0, 0.0}},
    {"huber delta=0.25", {1000.0, -1000.0, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     167.06041666666667, {0.08333333333333333, -0.08333333333333333, -0.08333333333333333}, {0.0, 0.0, 0.0}},
    {"huber delta=0.25", {1000.0, -1000.0, 0.0}, NUMBERS, {0.25, -1.0, 2.75},
     166.76041666666666, {0.08333333333333333, -0.08333333333333333, -0.08333333333333333}, {0.0, 0.0, 0.0}},
    {"huber delta=0.25", {1e-12, -3e-12, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     0.47083333333325, {-0.08333333333333333, -1e-12, -0.08333333333333333}, {0.0, -0.3333333333333333, 0.0}},
    {"huber delta=0.25", {1e-12, -3e-12, 0.0}, NUMBERS, {0.25, -1.0, 2.75},
     0.302083333333, {-0.083333333333, 0.08333333333333333, -0.08333333333333333}, {0.25, 0.0, 0.0}},
    {"huber delta=0.25", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     166666666667.06042, {0.08333333333333333, -0.08333333333333333, -0.08333333333333333}, {0.0, 0.0, 0.0}},
    {"huber delta=0.25", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.25, -1.0, 2.75},
     166666666666.7604, {0.08333333333333333, -0.08333333333333333, -0.08333333333333333}, {0.0, 0.0, 0.0}},
    {"huber delta=2.5", {0.5, -1.25, 3.0}, NUMBERS, {0.4, 0.0, 5.5},
     1.30375, {0.033333333333333326, -0.41666666666666663, -0.8333333333333333}, {0.25, -0.3333333333333333, 0.0}},
    {"huber delta=2.5", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     1666666666667.7917, {0.8333333333333333, -0.8333333333333333, -0.8333333333333333}, {0.0, 0.0, 0.0}},
    {"huber beta=0.25", {0.5, -1.25, 3.0}, NUMBERS, {0.4, 0.0, 5.5},
     1.1733333333333333, {0.1333333333333333, -0.3333333333333333, -0.3333333333333333}, {1.0, 0.0, 0.0}},
    {"huber beta=0.25", {0.5, -1.25, 3.0}, NUMBERS, {0.25, -1.0, 2.75},
     0.125, {0.3333333333333333, -0.3333333333333333, 0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"huber beta=0.25", {1000.0, -1000.0, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     668.2416666666667, {0.3333333333333333, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"huber beta=0.25", {1000.0, -1000.0, 0.0}, NUMBERS, {0.25, -1.0, 2.75},
     667.0416666666666, {0.3333333333333333, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"huber beta=0.25", {1e-12, -3e-12, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     1.883333333333, {-0.3333333333333333, -4e-12, -0.3333333333333333}, {0.0, -1.3333333333333333, 0.0}},
    {"huber beta=0.25", {1e-12, -3e-12, 0.0}, NUMBERS, {0.25, -1.0, 2.75},
     1.208333333332, {-0.333333333332, 0.3333333333333333, -0.3333333333333333}, {1.0, 0.0, 0.0}},
    {"huber beta=0.25", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     666666666668.2417, {0.3333333333333333, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"huber beta=0.25", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.25, -1.0, 2.75},
     666666666667.0416, {0.3333333333333333, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"huber beta=2.5", {0.5, -1.25, 3.0}, NUMBERS, {0.4, 0.0, 5.5},
     0.5215, {0.01333333333333333, -0.16666666666666666, -0.3333333333333333}, {0.09999999999999999, -0.13333333333333333, 0.0}},
    {"huber beta=2.5", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     666666666667.1167, {0.3333333333333333, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"huber beta=1000000000000", {0.5, -1.25, 3.0}, NUMBERS, {0.4, 0.0, 5.5},
     1.3037500000000002e-12, {3.333333333333333e-14, -4.1666666666666664e-13, -8.333333333333333e-13}, {2.5e-13, -3.3333333333333334e-13, 1.6666666666666667e-13}},
    {"huber beta=1000000000000", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.4, 0.0, 5.5},
     333333333333.2, {0.3333333333332, -0.3333333333333333, -1.833333333333333e-12}, {2.5e-13, 0.0, 1.6666666666666667e-13}},
    {"l1", {0.5, -1.25, 3.0}, NUMBERS, {0.5, 0.0, 5.5},
     1.25, {0.0, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"l1", {1e-12, -3e-12, 0.0}, NUMBERS, {0.5, 0.0, 5.5},
     2.0000000000006666, {-0.3333333333333333, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"l1", {1000000000000.0, -1000000000000.0, 0.0}, NUMBERS, {0.5, 0.0, 5.5},
     666666666668.3334, {0.3333333333333333, -0.3333333333333333, -0.3333333333333333}, {0.0, 0.0, 0.0}},
    {"kl_div", {-1.0, -2.0, -0.5}, NUMBERS, {0.2, 0.5, 0.3},
     0.32034698593542643, {-0.2, -0.5, -0.3}, {0.0, 0.0, 0.0}},
    {"kl_div", {-1.0, -2.0, -0.5}, NUMBERS, {0.0, 1.0, 0.0},
     2.0, {0.0, -1.0, 0.0}, {0.0, 0.0, 0.0}},
    {"kl_div", {-1.0, -2.0, -0.5}, NUMBERS, {1e-12, 2.0, 0.0},
     5.38629436109326, {-1e-12, -2.0, 0.0}, {0.0, 0.0, 0.0}},
    {"kl_div", {-1000.0, -1e-12, -40.0}, NUMBERS, {0.2, 0.5, 0.3},
     210.97034698593592, {-0.2, -0.5, -0.3}, {0.0, 0.0, 0.0}},
    {"kl_div", {-1000.0, -1e-12, -40.0}, NUMBERS, {0.0, 1.0, 0.0},
     1e-12, {0.0, -1.0, 0.0}, {0.0, 0.0, 0.0}},
    {"kl_div", {-1000.0, -1e-12, -40.0}, NUMBERS, {1e-12, 2.0, 0.0},
     1.3862943620942596, {-1e-12, -2.0, 0.0}, {0.0, 0.0, 0.0}},
    {"kl_div log_target=1", {-1.0, -2.0, -0.5}, NUMBERS, {-0.2, -5.0, -3.0},
     0.5103030905454693, {-0.8187307530779818, -0.006737946999085467, -0.049787068367863944}, {0.0, 0.0, 0.0}},
    {"kl_div log_target=1", {-1.0, -2.0, -0.5}, NUMBERS, {-1000.0, 0.0, -1e-12},
     2.4999999999985, {0.0, -1.0, -0.999999999999}, {0.0, 0.0, 0.0}},
    {"kl_div log_target=1", {-1000.0, -1e-12, -40.0}, NUMBERS, {-0.2, -5.0, -3.0},
     820.3754387219817, {-0.8187307530779818, -0.006737946999085467, -0.049787068367863944}, {0.0, 0.0, 0.0}},
    {"kl_div log_target=1", {-1000.0, -1e-12, -40.0}, NUMBERS, {-1000.0, 0.0, -1e-12},
     39.99999999996, {0.0, -1.0, -0.999999999999}, {0.0, 0.0, 0.0}},
    {"binary_cross_entropy", {0.25, 0.5, 0.9}, NUMBERS, {0.0, 1.0, 1.0},
     0.3620632562231842, {0.4444444444444444, -0.6666666666666666, -0.3703703703703704}, {0.4444444444397037, -1.333333333322667, 0.2057613168678558}},
    {"binary_cross_entropy", {0.25, 0.5, 0.9}, NUMBERS, {1.0, 0.0, 0.3},
     1.2409530871576717, {-1.3333333333333333, 0.6666666666666666, 2.2222222222222228}, {3.9999999999573337, -1.333333333322667, 11.72839506146777}},
    {"binary_cross_entropy", {1e-10, 0.9999999999, 0.5}, NUMBERS, {0.0, 1.0, 1.0},
     0.2310490602533151, {0.33333333336666665, -0.33333333336666665, -0.6666666666666666}, {NAN}},
    {"binary_cross_entropy", {1e-10, 0.9999999999, 0.5}, NUMBERS, {1.0, 0.0, 0.3},
     15.581616319233499, {-3333333333.3333335, 3333333057.5321198, 0.26666666666666666}, {NAN}},
    {"binary_cross_entropy", {1e-12, 0.3, 1e-06}, NUMBERS, {0.0, 1.0, 1.0},
     5.00649445409707, {0.3333333333336667, -1.111111111111111, -333333.3333333333}, {NAN}},
    {"binary_cross_entropy", {1e-12, 0.3, 1e-06}, NUMBERS, {1.0, 0.0, 0.3},
     10.710783309085636, {-333333333333.3334, 0.4761904761904762, -99999.76666643335}, {NAN}},
    {"binary_cross_entropy", {0.0, 1.0, 1.0}, NUMBERS, {0.0, 1.0, 1.0},
     0.0, {0.0, 0.0, 0.0}, {NAN}},
    {"binary_cross_entropy", {0.0, 1.0, 1.0}, NUMBERS, {1.0, 0.0, 0.3},
     90.0, {-333333334665.26764, 333333334665.26764, 233333334265.6873}, {NAN}},
};
/* clang-format on */

static pk_context zero_context(void)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    return context;
}

static double epsilon(void)
{
    return sizeof(pk_real) == sizeof(double) ? DBL_EPSILON : (double)FLT_EPSILON;
}

/* A 64-bit congruential generator, in [-1, 1). */
static double draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 11) / 4503599627370496.0 - 1;
}

static void against_torch(void **state)
{
    (void)state;
    if (sizeof(pk_real) < sizeof(double))
        skip(); /* 1e300 */
    for (size_t i = 0; i < sizeof constants / sizeof constants[0]; i++) {
        const constant *c = &constants[i];
        pk_real gradient[3], in_place[3];
        double value = pk_loss_value(c->loss, c->outputs, c->f, c->y);
        pk_loss_gradient(c->loss, c->outputs, c->f, c->y, gradient);
        memcpy(in_place, c->f, sizeof in_place);
        pk_loss_gradient(c->loss, c->outputs, in_place, c->y, in_place);
        assert_memory_equal(gradient, in_place, c->outputs * sizeof *gradient);
        double bound = 4 * epsilon() * fmax(1, fabs(c->value));
        if (!(fabs(value - c->value) <= bound))
            fail_msg("constant %zu, %s: %.17g, not %.17g", i, pk_loss_name(c->loss), value, c->value);
        for (size_t j = 0; j < c->outputs; j++) {
            bound = 4 * epsilon() * fmax(c->loss == PK_SOFTMAX_CROSS_ENTROPY ? 1 : 0.25, fabs(c->gradient[j]));
            if (!(fabs(gradient[j] - c->gradient[j]) <= bound))
                fail_msg("constant %zu, %s: gradient %zu is %.17g, not %.17g", i, pk_loss_name(c->loss), j,
                         (double)gradient[j], c->gradient[j]);
        }
    }
}

static pk_dataset dataset_of(size_t examples, size_t width, const double *inputs, pk_type type, size_t columns,
                             const void *targets);

static void options_against_torch(void **state)
{
    (void)state;
    pk_context context = zero_context();
    const double input = 0;
    const int64_t first = 0;
    if (sizeof(pk_real) < sizeof(double))
        skip(); /* 1e-12 beside 1 */
    for (size_t i = 0; i < sizeof with_options / sizeof with_options[0]; i++) {
        const optioned *o = &with_options[i];
        const int labels = o->label != NUMBERS;
        const pk_real v[3] = {0.75f, -1, 0.5f};
        pk_real y[3], gradient[3], product[3];
        pk_criterion criterion;
        pk_dataset data = dataset_of(1, 1, &input, labels ? PK_INT64 : PK_FLOAT64, labels ? 0 : 3,
                                     labels ? (const void *)&o->label : o->y);
        assert_int_equal(pk_criterion_parse(&context, o->loss, &criterion), PK_OK);
        assert_int_equal(pk_criterion_check(&context, &criterion, &data, 3), PK_OK);
        pk_criterion_targets(&criterion, &data, &first, 1, 3, y);
        const double value = pk_criterion_value(&criterion, 3, o->f, y);
        if (!(fabs(value - o->value) <= 8 * epsilon() * fmax(1e-3, fabs(o->value))))
            fail_msg("row %zu, %s: %.17g, not %.17g", i, o->loss, value, o->value);
        pk_criterion_gradient(&criterion, 3, o->f, y, gradient);
        pk_criterion_hessian_product(&criterion, 3, o->f, y, v, product);
        for (size_t j = 0; j < 3; j++) {
            if (!(fabs(gradient[j] - o->gradient[j]) <= 8 * epsilon() * fmax(0.25, fabs(o->gradient[j]))))
                fail_msg("row %zu, %s: gradient %zu is %.17g, not %.17g", i, o->loss, j, (double)gradient[j],
                         o->gradient[j]);
            const double near = criterion.loss == PK_BINARY_CROSS_ENTROPY ? 1e-10 : 8 * epsilon();
            if (o->product[0] == o->product[0] &&
                !(fabs(product[j] - o->product[j]) <= near * fmax(0.25, fabs(o->product[j]))))
                fail_msg("row %zu, %s: product %zu is %.17g, not %.17g", i, o->loss, j, (double)product[j],
                         o->product[j]);
        }
        pk_criterion_release(&context, &criterion);
    }
    assert_int_equal(context.memory_used, 0);
}

/* Any label of a step: with its weight, or ignored; PyTorch's mean of the losses is the sum times these weights. */
static void means_of_weighted_labels(void **state)
{
    (void)state;
    const double inputs[4] = {0}, weight[3] = {0.5, 2, 1.25}, numbers[4] = {0, 1, 2, 1};
    const int64_t labels[4] = {0, -7, 2, 1}, items[5] = {0, 1, 2, 3, 3}, ignored = 1;
    const pk_dataset data = dataset_of(4, 1, inputs, PK_INT64, 0, labels),
                     other = dataset_of(4, 1, inputs, PK_FLOAT64, 0, numbers);
    pk_criterion criterion = {.loss = PK_SOFTMAX_CROSS_ENTROPY};
    double c[5];
    pk_criterion_mean(&criterion, &data, items, 5, c);
    assert_true(c[0] == 1.0 / 5 && c[4] == 1.0 / 5);
    criterion.ignores = 1, criterion.ignore_index = -7;
    pk_criterion_mean(&criterion, &data, items, 5, c);
    assert_true(c[0] == 1.0 / 4 && c[1] == 1.0 / 4);
    criterion.weight = weight, criterion.weight_count = 3;
    pk_criterion_mean(&criterion, &data, items, 5, c);
    assert_true(c[0] == 1 / (0.5 + 1.25 + 2 + 2) && c[4] == c[0]);
    pk_criterion_mean(&criterion, &data, &ignored, 1, c);
    assert_true(isinf(c[0])); /* PyTorch's 0 / 0, once it is multiplied */
    pk_criterion_mean(&criterion, &other, items, 5, c);
    assert_true(c[0] == 1.0 / 5);
    criterion.loss = PK_L1; /* which has no such options */
    pk_criterion_mean(&criterion, &data, items, 5, c);
    assert_true(c[0] == 1.0 / 5);
}

static void options_are_parsed(void **state)
{
    (void)state;
    pk_context context = zero_context();
    pk_criterion criterion, again;
    char text[400], back[400];
    const char *good[] = {
        "squared",
        ("softmax_cross_entropy label_smoothing=0.10000000000000001 ignore_index=-100 "
         "weight=1,0.33333333333333331,0"),
        "nll ignore_index=0 weight=1e-300",
        "logistic pos_weight=3",
        "logistic pos_weight=1,2,3,4",
        "huber delta=1",
        "huber beta=1e12",
        "kl_div log_target=1",
        "l1",
        "binary_cross_entropy",
        "softmax_cross_entropy label_smoothing=1",
        "\thuber  delta=2.5 ",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(pk_criterion_parse(&context, good[i], &criterion), PK_OK);
        const size_t size = pk_criterion_format(&criterion, NULL, 0);
        assert_true(size > 1 && size <= sizeof text);
        assert_int_equal(pk_criterion_format(&criterion, text, sizeof text), size);
        assert_int_equal(strlen(text) + 1, size);
        assert_int_equal(pk_criterion_format(&criterion, back, 6), size); /* cut off */
        assert_true(strlen(back) == (size > 6 ? 5 : size - 1) && strncmp(back, text, strlen(back)) == 0);
        assert_int_equal(pk_criterion_parse(&context, text, &again), PK_OK);
        assert_int_equal(pk_criterion_format(&again, back, sizeof back), size);
        assert_string_equal(text, back);
        assert_int_equal(again.weight_count, criterion.weight_count);
        assert_true(!again.weight_count ||
                    memcmp(again.weight, criterion.weight, again.weight_count * sizeof(double)) == 0);
        pk_criterion_release(&context, &criterion);
        pk_criterion_release(&context, &again);
    }
    const struct {
        const char *text;
        pk_status status;
        const char *says;
    } bad[] = {
        {"huge delta=1", PK_FORMAT, "'huge' is not a loss"},
        {"squared delta=1", PK_FORMAT, "loss squared: 'delta=1' is not one of its options"},
        {"logistic weight=1", PK_FORMAT, "loss logistic: 'weight=1' is not one of its options"},
        {"huber delta=0", PK_ARGUMENT, "loss huber: delta is 0; it must be finite and > 0"},
        {"huber beta=0", PK_ARGUMENT, "(0 is the loss l1)"},
        {"huber delta=-1", PK_ARGUMENT, "delta is -1"},
        {"huber delta=1 beta=1", PK_ARGUMENT, "delta (HuberLoss) and beta (SmoothL1Loss) exclude each other"},
        {"huber delta=1 delta=1", PK_FORMAT, "gives delta a second time"},
        {"huber delta", PK_FORMAT, "'delta' is not delta=number"},
        {"huber delta=", PK_FORMAT, "'delta=' is not delta=number"},
        {"huber delta=1,2", PK_FORMAT, "'delta=1,2' is not delta=number"},
        {"huber delta=nan", PK_FORMAT, "'delta=nan' is not delta=number"},
        {"kl_div log_target=2", PK_ARGUMENT, "log_target is 2; it must be 0 or 1"},
        {"softmax_cross_entropy label_smoothing=1.5", PK_ARGUMENT,
         "label_smoothing is 1.5; it must be in [0, 1]"},
        {"softmax_cross_entropy label_smoothing=-0.1", PK_ARGUMENT, "must be in [0, 1]"},
        {"softmax_cross_entropy ignore_index=0.5", PK_ARGUMENT,
         "ignore_index is 0.5; it must be a whole number"},
        {"softmax_cross_entropy weight=1,-2", PK_ARGUMENT, "weight is -2; it must be finite and >= 0"},
        {"softmax_cross_entropy weight=1,,2", PK_FORMAT, "is not weight=number,number,..."},
        {"softmax_cross_entropy weight=1,2,", PK_FORMAT, "is not weight=number,number,..."},
        {"softmax_cross_entropy weight=,1", PK_FORMAT, "is not weight=number,number,..."},
        {"softmax_cross_entropy weight=1, 2", PK_FORMAT, "is not weight=number,number,..."},
        {"softmax_cross_entropy weight=", PK_FORMAT, "is not weight=number,number,..."},
        {"softmax_cross_entropy weight=1 weight=1", PK_FORMAT, "gives weight a second time"},
        {"", PK_FORMAT, "'' is not a loss"},
    };
    memset(&criterion, 7, sizeof criterion);
    again = criterion;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(pk_criterion_parse(&context, bad[i].text, &criterion), bad[i].status);
        if (!strstr(pk_message(&context), bad[i].says))
            fail_msg("'%s': %s", bad[i].text, pk_message(&context));
        assert_memory_equal(&criterion, &again, sizeof again);
    }
    assert_int_equal(pk_criterion_parse(&context, NULL, &criterion), PK_ARGUMENT);
    criterion.loss = (pk_loss)99;
    assert_int_equal(pk_criterion_format(&criterion, text, sizeof text), 0);
    assert_true(isnan(pk_criterion_value(&criterion, 1, (const pk_real[1]){0}, (const pk_real[1]){0})));
    pk_criterion_release(&context, NULL);
    assert_int_equal(context.memory_used, 0);
}

static void options_are_checked(void **state)
{
    (void)state;
    pk_context context = zero_context();
    const double inputs[4] = {0}, numbers[12] = {0, 1, 0, 0.5, 0.5, 0, 1, 0, 0, 0, 0, 1},
                 logs[4] = {-1, -2, 0, -3}, weight[3] = {1, 2, 3}, negative[3] = {1, -2, 3};
    const int64_t labels[4] = {0, 2, -100, 1};
    const pk_dataset data = dataset_of(4, 1, inputs, PK_INT64, 0, labels),
                     soft = dataset_of(4, 1, inputs, PK_FLOAT64, 3, numbers),
                     single = dataset_of(4, 1, inputs, PK_FLOAT64, 0, logs);
    pk_criterion c = {.loss = PK_SOFTMAX_CROSS_ENTROPY};
    assert_int_equal(pk_criterion_check(&context, &c, &data, 3), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 2: label -100 is not in [0, 3)"));
    c.ignores = 1, c.ignore_index = -100;
    assert_int_equal(pk_criterion_check(&context, &c, &data, 3), PK_OK);
    assert_int_equal(pk_criterion_check(&context, &c, &soft, 3), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "ignore_index is a label, and the targets are numbers"));
    c.weight = weight, c.weight_count = 3;
    assert_int_equal(pk_criterion_check(&context, &c, &data, 3), PK_OK);
    assert_int_equal(pk_criterion_check(&context, &c, &data, 4), PK_SHAPE);
    assert_non_null(strstr(pk_message(&context), "weight has 3 numbers for 4 outputs"));
    c.weight = negative;
    assert_int_equal(pk_criterion_check(&context, &c, &data, 3), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "weight is -2; it must be finite and >= 0"));
    c = (pk_criterion){.loss = PK_LOGISTIC, .weight = weight, .weight_count = 3};
    assert_int_equal(pk_criterion_check(&context, &c, &soft, 3), PK_OK);
    c.weight_count = 2;
    assert_int_equal(pk_criterion_check(&context, &c, &soft, 3), PK_SHAPE);
    assert_non_null(strstr(pk_message(&context), "pos_weight has 2 numbers for 3 outputs"));
    c.weight_count = 1;
    assert_int_equal(pk_criterion_check(&context, &c, &soft, 3), PK_OK);
    c = (pk_criterion){.loss = PK_KL_DIV};
    assert_int_equal(pk_criterion_check(&context, &c, &single, 1), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 0: kl_div takes numbers >= 0; the row starts with -1"));
    c.log_target = 1;
    assert_int_equal(pk_criterion_check(&context, &c, &single, 1), PK_OK);
    assert_int_equal(pk_criterion_check(&context, &c, &data, 3), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "log_target=1 takes logarithms of probabilities"));
    c = (pk_criterion){.loss = PK_BINARY_CROSS_ENTROPY};
    assert_int_equal(pk_criterion_check(&context, &c, &soft, 3), PK_OK);
    assert_int_equal(pk_criterion_check(&context, &c, &single, 1), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 0: binary_cross_entropy takes numbers in [0, 1]"));
    c = (pk_criterion){.loss = PK_HUBER, .delta = (double)NAN};
    assert_int_equal(pk_criterion_check(&context, &c, &soft, 3), PK_ARGUMENT);
    c = (pk_criterion){.loss = PK_SOFTMAX_CROSS_ENTROPY, .label_smoothing = 2};
    assert_int_equal(pk_criterion_check(&context, &c, &soft, 3), PK_ARGUMENT);
    assert_int_equal(pk_criterion_check(&context, NULL, &soft, 3), PK_ARGUMENT);
    assert_int_equal(context.memory_used, 0);
}

/* The definitions, in long double; magnitude: what rounding errors are relative to. */
static long double naive_value(pk_loss loss, size_t n, const long double *f, const pk_real *y)
{
    long double sum = 0, total = 0, mean = 1 / (long double)n;
    size_t k = 0;
    for (size_t j = 0; j < n; j++) {
        total += expl(f[j]);
        k = y[j] > y[k] ? j : k;
    }
    for (size_t j = 0; j < n; j++) {
        long double d = f[j] - y[j], z = 1 - f[k] + f[j];
        switch (loss) {
        case PK_SQUARED: sum += d * d / 2; break;
        case PK_MEAN_SQUARED: sum += mean * d * d; break;
        case PK_SOFTMAX_CROSS_ENTROPY: sum += y[j] * (logl(total) - f[j]); break;
        case PK_LOGISTIC:
            sum -= mean * (y[j] * logl(1 / (1 + expl(-f[j]))) + (1 - y[j]) * logl(1 / (1 + expl(f[j]))));
            break;
        case PK_NLL: sum -= y[j] * f[j]; break;
        case PK_HUBER: sum += mean * (fabsl(d) < 1 ? d * d / 2 : fabsl(d) - 0.5L); break;
        case PK_L1: sum += mean * fabsl(d); break;
        case PK_KL_DIV: sum += y[j] > 0 ? y[j] * (logl(y[j]) - f[j]) : 0; break;
        case PK_BINARY_CROSS_ENTROPY: sum -= mean * (y[j] * logl(f[j]) + (1 - y[j]) * logl(1 - f[j])); break;
        case PK_RECORDED: sum += y[j] * f[j]; break;
        case PK_HINGE:
            if (n == 1)
                sum = fmaxl(0, 1 - y[0] * f[0]);
            else if (j != k && z > 0)
                sum += mean * z;
            break;
        }
    }
    return sum;
}

/* An output that the loss takes. */
static pk_real random_output(pk_loss loss, uint64_t *state)
{
    return (pk_real)(loss == PK_BINARY_CROSS_ENTROPY ? 0.5 + 0.45 * draw(state) : 6 * draw(state));
}

static void random_target(pk_loss loss, size_t n, uint64_t *state, pk_real *y)
{
    double sum = 0;
    int hard = loss == PK_HINGE || draw(state) > 0;
    for (size_t j = 0; j < n; j++)
        sum += y[j] = (pk_real)(hard ? 0 : 0.5 + 0.5 * draw(state));
    if (n == 1 && loss == PK_HINGE)
        y[0] = draw(state) > 0 ? 1 : -1;
    else if (hard)
        y[(size_t)((0.5 + 0.5 * draw(state)) * (double)n)] = 1;
    else if (loss == PK_SOFTMAX_CROSS_ENTROPY)
        for (size_t j = 0; j < n; j++)
            y[j] = (pk_real)(y[j] / sum);
}

static void against_definition(void **state)
{
    (void)state;
    uint64_t seed = 7;
    for (int loss = PK_SQUARED; loss <= PK_RECORDED; loss++)
        for (int trial = 0; trial < 300; trial++) {
            enum { N = 7 };
            size_t n = 1 + (size_t)trial % N;
            pk_real f[N], y[N], gradient[N];
            long double exact[N], size = 1;
            for (size_t j = 0; j < n; j++) {
                exact[j] = f[j] = random_output((pk_loss)loss, &seed);
                size += fabsl(exact[j]);
            }
            random_target((pk_loss)loss, n, &seed, y);
            long double truth = naive_value((pk_loss)loss, n, exact, y);
            double value = pk_loss_value((pk_loss)loss, n, f, y);
            long double scale = loss == PK_NLL || loss == PK_HINGE || loss == PK_KL_DIV ? size : fabsl(truth);
            for (size_t j = 0; loss == PK_RECORDED && j < n; j++) /* where they cancel */
                scale += fabsl(exact[j] * y[j]);
            assert_true(fabsl(value - truth) <= 8 * epsilon() * scale + 1e-17L);
            pk_loss_gradient((pk_loss)loss, n, f, y, gradient);
            for (size_t j = 0; j < n; j++) { /* differences of the definition */
                long double h = 1e-6L, centre = exact[j];
                exact[j] = centre + h;
                long double up = naive_value((pk_loss)loss, n, exact, y);
                exact[j] = centre - h;
                long double down = naive_value((pk_loss)loss, n, exact, y);
                exact[j] = centre;
                if (loss == PK_L1 && fabsl(centre - y[j]) < 2 * h)
                    continue;
                const long double third = loss == PK_BINARY_CROSS_ENTROPY ? 1e-7L : 1e-10L; /* 1 / f^3 */
                assert_true(fabsl((up - down) / (2 * h) - gradient[j]) <= third + 8 * epsilon() * size);
            }
        }
}

/* Products with the Hessian against mixed differences of the definition; also where they overwrite the direction. */
static void hessian_against_definition(void **state)
{
    (void)state;
    uint64_t seed = 11;
    for (int loss = PK_SQUARED; loss <= PK_RECORDED; loss++)
        for (int trial = 0; trial < 300; trial++) {
            enum { N = 7 };
            const long double h = 1e-4L;
            const size_t n = 1 + (size_t)trial % N;
            pk_real f[N], y[N], v[N], product[N];
            long double at[N], total = 0;
            int kink = 0;
            for (size_t j = 0; j < n; j++) {
                f[j] = random_output((pk_loss)loss, &seed);
                v[j] = (pk_real)draw(&seed);
            }
            random_target((pk_loss)loss, n, &seed, y);
            for (size_t j = 0; j < n; j++) { /* a kink, or a jump of the second derivative, within reach? */
                size_t k = 0;
                for (size_t i = 0; i < n; i++)
                    k = y[i] > y[k] ? i : k;
                kink |= loss == PK_HUBER && fabs(fabs((double)f[j] - y[j]) - 1) < 1e-3;
                kink |= loss == PK_L1 && fabs((double)f[j] - y[j]) < 1e-3;
                kink |=
                    loss == PK_HINGE && fabs(n == 1 ? 1 - (double)y[0] * f[0] : 1 - (double)f[k] + f[j]) < 1e-3;
            }
            if (kink)
                continue;
            pk_loss_hessian_product((pk_loss)loss, n, f, y, v, product);
            for (size_t j = 0; j < n; j++) {
                long double mixed = 0;
                for (int corner = 0; corner < 4; corner++) {
                    const long double a = corner & 1 ? -h : h, b = corner & 2 ? -h : h;
                    for (size_t i = 0; i < n; i++)
                        at[i] = f[i] + b * v[i] + (i == j ? a : 0);
                    mixed += (a * b > 0 ? 1 : -1) * naive_value((pk_loss)loss, n, at, y);
                }
                const long double fourth = loss == PK_BINARY_CROSS_ENTROPY ? 1e-1L : 1e-7L; /* h^2 / f^4 */
                assert_true(fabsl(mixed / (4 * h * h) - product[j]) <= fourth + 8 * epsilon());
                total += product[j];
            }
            if (loss == PK_SOFTMAX_CROSS_ENTROPY) /* it does not see a shift of all outputs */
                assert_true(fabsl(total) <= 8 * epsilon());
            pk_loss_hessian_product((pk_loss)loss, n, f, y, v, v);
            assert_memory_equal(v, product, n * sizeof *v);
        }
    /* Where the network is sure, a little is left, to its last digits; huber's jump counts as outside. */
    const pk_real sure[2] = {40, 0}, one[2] = {1, 0}, other[2] = {0, 1}, far[2] = {1, -1}, zero[2] = {0, 0};
    const long double small = expl(-40.0L) / ((1 + expl(-40.0L)) * (1 + expl(-40.0L)));
    pk_real product[2];
    pk_loss_hessian_product(PK_SOFTMAX_CROSS_ENTROPY, 2, sure, one, other, product);
    assert_true(fabsl(product[0] + small) <= 4 * epsilon() * small);
    assert_true(fabsl(product[1] - small) <= 4 * epsilon() * small);
    pk_loss_hessian_product(PK_LOGISTIC, 2, sure, one, one, product);
    assert_true(fabsl(product[0] - small / 2) <= 4 * epsilon() * small);
    pk_loss_hessian_product(PK_HUBER, 2, far, zero, far, product);
    assert_true(product[0] == 0 && product[1] == 0);
    pk_loss_hessian_product((pk_loss)99, 2, far, zero, far, product);
    assert_true(product[0] != product[0] && product[1] != product[1]);
}

/* Where the network is sure, value and gradient are small: they keep their relative accuracy. */
static void small_residuals(void **state)
{
    (void)state;
    for (int gap = 5; gap <= 700; gap += 5) {
        if (sizeof(pk_real) < 8 && gap > 80)
            break;
        pk_real f[3] = {(pk_real)gap, 0, (pk_real)(-gap)}, y[3] = {1, 0, 0}, gradient[3];
        long double small = expl(-(long double)gap), tiny = small * small;
        long double softmax = log1pl(small + tiny), logistic = log1pl(small) / 3;
        double value = pk_loss_value(PK_SOFTMAX_CROSS_ENTROPY, 3, f, y);
        assert_true(fabsl(value - softmax) <= 4 * epsilon() * softmax);
        pk_loss_gradient(PK_SOFTMAX_CROSS_ENTROPY, 3, f, y, gradient);
        assert_true(fabsl(gradient[0] + (small + tiny) / (1 + small + tiny)) <= 4 * epsilon() * small);
        assert_true(fabsl(gradient[1] - small / (1 + small + tiny)) <= 4 * epsilon() * small);
        f[1] = -f[0];
        value = pk_loss_value(PK_LOGISTIC, 3, f, y);
        assert_true(fabsl(value - 3 * logistic) <= 8 * epsilon() * logistic);
        pk_loss_gradient(PK_LOGISTIC, 3, f, y, gradient);
        assert_true(fabsl(gradient[0] + small / (1 + small) / 3) <= 4 * epsilon() * small);
        assert_true(fabsl(gradient[1] - small / (1 + small) / 3) <= 4 * epsilon() * small);
    }
}

static void not_finite_outputs_show(void **state)
{
    (void)state;
    const pk_real y[3] = {1, 0, 0};
    pk_real gradient[3];
    for (int loss = PK_SQUARED; loss <= PK_RECORDED; loss++) {
        pk_real f[3] = {(pk_real)NAN, 1, 2};
        assert_false(isfinite(pk_loss_value((pk_loss)loss, 3, f, y)));
        pk_loss_gradient((pk_loss)loss, 3, f, y, gradient);
        assert_true(loss == PK_NLL || loss == PK_KL_DIV || loss == PK_RECORDED || !isfinite(gradient[0]));
        f[0] = (pk_real)INFINITY;
        double value = pk_loss_value((pk_loss)loss, 3, f, y);
        assert_true(!isfinite(value) || loss == PK_LOGISTIC || loss == PK_HINGE);
    }
    assert_true(isnan(pk_loss_value((pk_loss)99, 3, y, y)));
}

static void names(void **state)
{
    (void)state;
    pk_context context = zero_context();
    pk_loss loss = PK_HUBER;
    for (int i = PK_SQUARED; i <= PK_RECORDED; i++) {
        assert_int_equal(pk_loss_parse(&context, pk_loss_name((pk_loss)i), &loss), PK_OK);
        assert_int_equal(loss, i);
    }
    assert_int_equal(pk_loss_parse(&context, "hing", &loss), PK_FORMAT);
    assert_non_null(strstr(pk_message(&context), "'hing' is not a loss"));
    assert_non_null(
        strstr(pk_message(&context),
               "softmax_cross_entropy, logistic, nll, huber, hinge, l1, kl_div, binary_cross_entropy"));
    assert_int_equal(pk_loss_parse(NULL, NULL, &loss), PK_ARGUMENT);
    assert_int_equal(loss, PK_RECORDED);
    assert_string_equal(pk_loss_name((pk_loss)0), "unknown");
}

static pk_dataset dataset_of(size_t examples, size_t width, const double *inputs, pk_type type, size_t columns,
                             const void *targets)
{
    pk_dataset dataset;
    size_t shape[2] = {examples, width}, target_shape[2] = {examples, columns};
    dataset.inputs = pk_array_view(PK_FLOAT64, 2, shape, inputs);
    dataset.targets = pk_array_view(type, columns ? 2 : 1, target_shape, targets);
    return dataset;
}

static void targets_are_checked(void **state)
{
    (void)state;
    pk_context context = zero_context();
    const double inputs[4] = {0, 0, 0, 0};
    const int64_t labels[4] = {0, 2, 1, 2}, wrong[4] = {0, 2, 3, -1}, binary[4] = {0, 1, 1, 0},
                  signs[4] = {1, -1, 1, 1};
    const double soft[8] = {0.25, 0.75, 1, 0, 0.5, 0.5, 0, 2}, hole[4] = {0, 1, NAN, 0},
                 minus[4] = {1, -1, 1, 0.5};
    const float single[4] = {0, 1, 0.5f, 1};
    pk_dataset data = dataset_of(4, 1, inputs, PK_INT64, 0, labels);
    for (int loss = PK_SQUARED; loss <= PK_RECORDED; loss++) {
        assert_int_equal(pk_loss_check(&context, (pk_loss)loss, &data, 3), PK_OK);
        assert_int_equal(pk_loss_check(&context, (pk_loss)loss, &data, 2), PK_ARGUMENT);
        assert_non_null(strstr(pk_message(&context), "row 1: label 2 is not in [0, 2)"));
    }
    data = dataset_of(4, 1, inputs, PK_INT64, 0, wrong);
    assert_int_equal(pk_loss_check(&context, PK_HINGE, &data, 4), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 3: label -1"));
    data = dataset_of(4, 1, inputs, PK_INT64, 0, binary); /* one output: numbers */
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 1), PK_OK);
    assert_int_equal(pk_loss_check(&context, PK_HINGE, &data, 1), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 0: hinge takes +1 or -1; the row starts with 0"));
    assert_int_equal(pk_loss_check(&context, PK_SOFTMAX_CROSS_ENTROPY, &data, 1), PK_ARGUMENT);
    data = dataset_of(4, 1, inputs, PK_INT64, 0, signs);
    assert_int_equal(pk_loss_check(&context, PK_HINGE, &data, 1), PK_OK);
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 1), PK_ARGUMENT);
    data = dataset_of(4, 1, inputs, PK_FLOAT64, 2, soft);
    assert_int_equal(pk_loss_check(&context, PK_SOFTMAX_CROSS_ENTROPY, &data, 2), PK_OK);
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 2), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 3: logistic takes numbers in [0, 1]"));
    assert_int_equal(pk_loss_check(&context, PK_HINGE, &data, 2), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 0"));
    assert_int_equal(pk_loss_check(&context, PK_SQUARED, &data, 1), PK_SHAPE);
    assert_int_equal(pk_loss_check(&context, PK_SQUARED, &data, 3), PK_SHAPE);
    data = dataset_of(4, 1, inputs, PK_FLOAT64, 0, hole);
    assert_int_equal(pk_loss_check(&context, PK_SQUARED, &data, 1), PK_NOT_FINITE);
    assert_non_null(strstr(pk_message(&context), "row 2"));
    data = dataset_of(4, 1, inputs, PK_FLOAT64, 0, minus);
    assert_int_equal(pk_loss_check(&context, PK_SQUARED, &data, 1), PK_OK);
    assert_int_equal(pk_loss_check(&context, PK_NLL, &data, 1), PK_ARGUMENT);
    assert_int_equal(pk_loss_check(&context, PK_HINGE, &data, 1), PK_ARGUMENT);
    data = dataset_of(4, 1, inputs, PK_FLOAT32, 0, single);
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 1), PK_OK);
    static const unsigned char bools[4] = {1, 0, 1, 1};
    data = dataset_of(4, 1, inputs, PK_BOOL, 0, bools);
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 1), PK_OK);
    static const unsigned char bytes[4] = {1, 0, 2, 1};
    data = dataset_of(4, 1, inputs, PK_UINT8, 0, bytes);
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 1), PK_ARGUMENT);
    static const int32_t small[4] = {2, 0, 1, 3};
    data = dataset_of(4, 1, inputs, PK_INT32, 0, small);
    assert_int_equal(pk_loss_check(&context, PK_SOFTMAX_CROSS_ENTROPY, &data, 4), PK_OK);
    assert_int_equal(pk_loss_check(&context, PK_SOFTMAX_CROSS_ENTROPY, &data, 3), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "row 3: label 3"));
    data = dataset_of(4, 1, inputs, PK_INT64, 1, labels);
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 1), PK_SHAPE);
    data.targets.shape[0] = 3;
    assert_int_equal(pk_loss_check(&context, PK_LOGISTIC, &data, 1), PK_SHAPE);
    assert_int_equal(pk_loss_check(&context, (pk_loss)0, &data, 1), PK_ARGUMENT);
    assert_int_equal(pk_loss_check(&context, PK_HUBER, NULL, 1), PK_ARGUMENT);
    assert_int_equal(pk_loss_check(&context, PK_HUBER, &data, 0), PK_ARGUMENT);
    assert_int_equal(context.memory_used, 0);
}

static void targets_become_vectors(void **state)
{
    (void)state;
    const double inputs[4] = {0, 0, 0, 0}, soft[8] = {0.25, 0.75, 1, 0, 0.5, 0.5, 0, 2};
    const int64_t labels[4] = {0, 2, 1, -1}, items[3] = {3, 1, 1};
    pk_real y[9];
    pk_dataset data = dataset_of(4, 1, inputs, PK_INT64, 0, labels);
    pk_loss_targets(PK_SQUARED, &data, items, 3, 3, y);
    const pk_real one_hot[9] = {0, 0, 0, 0, 0, 1, 0, 0, 1};
    assert_memory_equal(y, one_hot, sizeof one_hot);
    pk_loss_targets(PK_HINGE, &data, items, 3, 1, y);
    assert_true(y[0] == -1 && y[1] == 2 && y[2] == 2);
    data = dataset_of(4, 1, inputs, PK_FLOAT64, 2, soft);
    pk_loss_targets(PK_SOFTMAX_CROSS_ENTROPY, &data, items, 3, 2, y);
    const pk_real rows[6] = {0, 2, 1, 0, 1, 0};
    assert_memory_equal(y, rows, sizeof rows);
}

/* ---- batches ------------------------------------------------------------------------------------------ */

/* input 6; dense 9; tanh; dense 7; relu; dense outputs */
enum { WIDTH = 6, FIRST = 9, SECOND = 7, LARGEST = 5 };

typedef struct naive_network {
    size_t outputs, parameters;
} naive_network;

/* gradient += c dl/dw, magnitude the same with absolute values; returns c l. Naive, in long double. */
static long double naive_example(const naive_network *network, pk_loss loss, const pk_real *w, const double *x,
                                 const pk_real *y, double c, long double *gradient)
{
    size_t n = network->outputs, sizes[4] = {WIDTH, FIRST, SECOND, n}, offset = 0, starts[3];
    long double a[4][FIRST + 1], delta[FIRST + 1], back[FIRST + 1];
    for (size_t j = 0; j < WIDTH; j++)
        a[0][j] = x[j];
    for (size_t layer = 0; layer < 3; layer++) {
        size_t in = sizes[layer], out = sizes[layer + 1];
        starts[layer] = offset;
        for (size_t i = 0; i < out; i++) {
            long double z = w[offset + out * in + i];
            for (size_t j = 0; j < in; j++)
                z += w[offset + i * in + j] * a[layer][j];
            a[layer + 1][i] = layer == 0 ? tanhl(z) : layer == 1 ? (z > 0 ? z : 0) : z;
        }
        offset += out * in + out;
    }
    pk_real f[LARGEST], seed[LARGEST];
    for (size_t j = 0; j < n; j++)
        f[j] = (pk_real)a[3][j];
    pk_loss_gradient(loss, n, f, y, seed); /* tested above */
    for (size_t j = 0; j < n; j++)
        delta[j] = c * seed[j];
    for (size_t layer = 3; layer-- > 0;) {
        size_t in = sizes[layer], out = sizes[layer + 1];
        for (size_t i = 0; i < out; i++) {
            gradient[starts[layer] + out * in + i] += delta[i];
            for (size_t j = 0; j < in; j++)
                gradient[starts[layer] + i * in + j] += delta[i] * a[layer][j];
        }
        for (size_t j = 0; j < in; j++) {
            back[j] = 0;
            for (size_t i = 0; i < out; i++)
                back[j] += w[starts[layer] + i * in + j] * delta[i];
            back[j] *= layer == 1 ? 1 - a[1][j] * a[1][j] : layer == 2 ? (a[2][j] > 0) : 1;
        }
        memcpy(delta, back, sizeof delta);
    }
    return c * naive_value(loss, n, a[3], y);
}

typedef struct problem {
    pk_graph graph;
    pk_dataset data;
    size_t examples, outputs;
    double *inputs, *batch_weights;
    void *targets;
    int64_t *items;
    pk_real *weights, *gradient, *other;
} problem;

/* A network, made data that fit the loss, and a list of 4 * examples rows with repetitions. */
static void problem_make(const char *network, pk_loss loss, size_t examples, problem *p)
{
    uint64_t seed = 11;
    memset(p, 0, sizeof *p);
    assert_int_equal(pk_network_parse(NULL, network, &p->graph), PK_OK);
    size_t width = p->graph.input_width, outputs = p->graph.output_width, count = 4 * examples;
    p->examples = examples;
    p->outputs = outputs;
    p->inputs = (double *)calloc(examples * width, sizeof(double));
    p->targets = calloc(examples * outputs, sizeof(double));
    p->items = (int64_t *)calloc(count, sizeof(int64_t));
    p->batch_weights = (double *)calloc(count, sizeof(double));
    p->weights = (pk_real *)calloc(p->graph.parameters, sizeof(pk_real));
    p->gradient = (pk_real *)calloc(p->graph.parameters, sizeof(pk_real));
    p->other = (pk_real *)calloc(p->graph.parameters, sizeof(pk_real));
    assert_true(p->inputs && p->targets && p->items && p->batch_weights && p->weights && p->gradient &&
                p->other);
    for (size_t i = 0; i < examples * width; i++)
        p->inputs[i] = 2 * draw(&seed);
    int classes = loss == PK_SOFTMAX_CROSS_ENTROPY || loss == PK_NLL || (loss == PK_HINGE && outputs > 1);
    for (size_t i = 0; i < examples; i++) {
        pk_real y[64];
        random_target(loss, outputs, &seed, y);
        for (size_t j = 0; j < outputs && !classes; j++)
            ((double *)p->targets)[i * outputs + j] = y[j];
        if (classes)
            ((int64_t *)p->targets)[i] = (int64_t)((0.5 + 0.5 * draw(&seed)) * (double)outputs);
    }
    p->data = dataset_of(examples, width, p->inputs, classes ? PK_INT64 : PK_FLOAT64, classes ? 0 : outputs,
                         p->targets);
    assert_int_equal(pk_loss_check(NULL, loss, &p->data, outputs), PK_OK);
    for (size_t b = 0; b < count; b++) {
        p->items[b] = (int64_t)((0.5 + 0.5 * draw(&seed)) * (double)examples);
        p->batch_weights[b] = draw(&seed);
    }
    assert_int_equal(pk_network_initialize(NULL, &p->graph, 3, p->weights), PK_OK);
}

static void problem_free(problem *p)
{
    pk_graph_release(NULL, &p->graph);
    free(p->inputs), free(p->targets), free(p->items), free(p->batch_weights);
    free(p->weights), free(p->gradient), free(p->other);
}

static void batch_against_naive(void **state)
{
    (void)state;
    for (int loss = PK_SQUARED; loss <= PK_KL_DIV + 1; loss++) { /* the last one: hinge of one output */
        problem p;
        pk_loss l = loss > PK_KL_DIV ? PK_HINGE : (pk_loss)loss;
        const size_t counts[5] = {1, 7, 64, 65, 200};
        pk_gradient_workspace workspace;
        problem_make(loss > PK_KL_DIV ? "input 6; dense 9; tanh; dense 7; relu; dense 1"
                                      : "input 6; dense 9; tanh; dense 7; relu; dense 4",
                     l, 60, &p);
        naive_network network = {p.outputs, p.graph.parameters};
        assert_int_equal(pk_gradient_prepare(NULL, &p.graph, 200, &workspace), PK_OK);
        for (int i = 0; i < 10; i++) {
            pk_batch batch = {counts[i / 2], p.items + i, i % 2 ? p.batch_weights : NULL};
            long double *truth = (long double *)calloc(network.parameters, sizeof *truth), value = 0, size = 0;
            double objective = 0;
            assert_non_null(truth);
            for (size_t b = 0; b < batch.count; b++) {
                pk_real y[LARGEST];
                double c = batch.weights ? batch.weights[b] : 1 / (double)batch.count;
                pk_loss_targets(l, &p.data, batch.items + b, 1, p.outputs, y);
                value += naive_example(&network, l, p.weights, p.inputs + WIDTH * batch.items[b], y, c, truth);
                size += fabs(c);
            }
            assert_int_equal(pk_batch_gradient(NULL, &p.graph, l, p.weights, &p.data, &batch, &workspace,
                                               &objective, p.gradient),
                             PK_OK);
            /* Entries are sums of count terms of size up to c |w| |a|, a few units. */
            long double bound = 64 * epsilon() * size * (1 + sqrtl((long double)batch.count));
            assert_true(fabsl(objective - value) <= bound);
            for (size_t k = 0; k < network.parameters; k++)
                assert_true(fabsl(p.gradient[k] - truth[k]) <= bound);
            assert_int_equal(
                pk_batch_gradient(NULL, &p.graph, l, p.weights, &p.data, &batch, &workspace, NULL, p.other),
                PK_OK);
            assert_memory_equal(p.gradient, p.other, network.parameters * sizeof *p.other);
            free(truth);
        }
        pk_gradient_release(NULL, &workspace);
        problem_free(&p);
    }
}

static void batch_against_differences(void **state)
{
    (void)state;
    if (sizeof(pk_real) < sizeof(double))
        return;
    for (int loss = PK_SQUARED; loss <= PK_RECORDED; loss++) {
        problem p;
        pk_gradient_workspace workspace;
        problem_make(loss == PK_BINARY_CROSS_ENTROPY
                         ? "input 4; dense 6; softplus; dense 5; gelu; dense 3; sigmoid"
                         : "input 4; dense 6; softplus; dense 5; gelu; dense 3",
                     (pk_loss)loss, 60, &p);
        assert_int_equal(pk_gradient_prepare(NULL, &p.graph, 150, &workspace), PK_OK);
        pk_batch batch = {150, p.items, p.batch_weights};
        assert_int_equal(pk_batch_gradient(NULL, &p.graph, (pk_loss)loss, p.weights, &p.data, &batch,
                                           &workspace, NULL, p.gradient),
                         PK_OK);
        for (size_t k = 0; k < p.graph.parameters; k++) {
            double h = 1e-6, centre = p.weights[k], up, down;
            p.weights[k] = (pk_real)(centre + h);
            assert_int_equal(pk_batch_gradient(NULL, &p.graph, (pk_loss)loss, p.weights, &p.data, &batch,
                                               &workspace, &up, p.other),
                             PK_OK);
            p.weights[k] = (pk_real)(centre - h);
            assert_int_equal(pk_batch_gradient(NULL, &p.graph, (pk_loss)loss, p.weights, &p.data, &batch,
                                               &workspace, &down, p.other),
                             PK_OK);
            p.weights[k] = (pk_real)centre;
            assert_true(fabs((up - down) / (2 * h) - p.gradient[k]) <= 1e-7);
        }
        pk_gradient_release(NULL, &workspace);
        problem_free(&p);
    }
}

static void same_bits_for_any_threads(void **state)
{
    (void)state;
    /* Many groups; two blocks a group; blocks of a large network; one block, whose layers the threads share. */
    const char *networks[4] = {"input 20; dense 60; tanh; dense 16", "input 20; dense 60; tanh; dense 16",
                               "input 64; dense 300; tanh; dense 60",
                               "input 300; dense 301; tanh; dense 203; relu; dense 10"};
    const size_t counts[4] = {1000, 4100, 200, 50}, threads[4] = {1, 2, 3, 7};
    for (int i = 0; i < 4; i++) {
        problem p;
        double first = 0;
        problem_make(networks[i], PK_SOFTMAX_CROSS_ENTROPY, (counts[i] + 3) / 4, &p);
        pk_batch batch = {counts[i], p.items, NULL};
        for (int j = 0; j < 4; j++) {
            pk_context context = zero_context();
            pk_gradient_workspace workspace;
            double objective = 0;
            context.threads = (int)threads[j];
            assert_int_equal(pk_gradient_prepare(&context, &p.graph, counts[i] + (size_t)j, &workspace), PK_OK);
            assert_int_equal(pk_batch_gradient(&context, &p.graph, PK_SOFTMAX_CROSS_ENTROPY, p.weights, &p.data,
                                               &batch, &workspace, &objective, j ? p.other : p.gradient),
                             PK_OK);
            if (j == 0)
                first = objective;
            assert_memory_equal(&objective, &first, sizeof first);
            assert_true(j == 0 || !memcmp(p.gradient, p.other, p.graph.parameters * sizeof *p.other));
            pk_gradient_release(&context, &workspace);
            assert_int_equal(context.memory_used, 0);
        }
        problem_free(&p);
    }
}

/* Layers that are cut into tiles, against the same examples one by one, which are not. */
static void layers_in_tiles(void **state)
{
    (void)state;
    enum { ROWS = 50 };
    problem p;
    pk_gradient_workspace workspace;
    pk_context context = zero_context();
    problem_make("input 300; dense 301; tanh; dense 203; relu; dense 10", PK_SOFTMAX_CROSS_ENTROPY, ROWS, &p);
    const size_t P = p.graph.parameters;
    double *sum = (double *)calloc(P, sizeof *sum), worst = 0, largest = 0;
    assert_non_null(sum);
    context.threads = 2;
    assert_int_equal(pk_gradient_prepare(&context, &p.graph, ROWS, &workspace), PK_OK);
    for (size_t b = 0; b < ROWS; b++) {
        const pk_batch one = {1, p.items + b, NULL};
        assert_int_equal(pk_batch_gradient(&context, &p.graph, PK_SOFTMAX_CROSS_ENTROPY, p.weights, &p.data,
                                           &one, &workspace, NULL, p.gradient),
                         PK_OK);
        for (size_t k = 0; k < P; k++)
            sum[k] += p.gradient[k] / ROWS;
    }
    const pk_batch all = {ROWS, p.items, NULL};
    assert_int_equal(pk_batch_gradient(&context, &p.graph, PK_SOFTMAX_CROSS_ENTROPY, p.weights, &p.data, &all,
                                       &workspace, NULL, p.gradient),
                     PK_OK);
    for (size_t k = 0; k < P; k++) {
        worst = fmax(worst, fabs(sum[k] - p.gradient[k]));
        largest = fmax(largest, fabs(sum[k]));
    }
    assert_true(worst <= (sizeof(pk_real) == 8 ? 1e-13 : 1e-5) * largest);
    free(sum);
    pk_gradient_release(&context, &workspace);
    problem_free(&p);
}

typedef struct counter {
    int calls, left;
} counter;

static void *counting_allocate(void *user, size_t bytes, size_t alignment)
{
    counter *count = (counter *)user;
    void *memory = NULL;
    count->calls++;
    if (count->left-- <= 0 || posix_memalign(&memory, alignment, bytes))
        return NULL;
    return memory;
}

static void counting_release(void *user, void *pointer, size_t bytes)
{
    (void)user, (void)bytes;
    free(pointer);
}

static void batch_memory(void **state)
{
    (void)state;
    problem p;
    pk_context context = zero_context();
    counter count = {0, 0};
    pk_gradient_workspace workspace, untouched;
    problem_make("input 6; dense 9; tanh; dense 4", PK_SQUARED, 100, &p);
    context.allocator.allocate = counting_allocate;
    context.allocator.release = counting_release;
    context.allocator.user = &count;
    memset(&workspace, 1, sizeof workspace);
    memset(&untouched, 1, sizeof untouched);
    assert_int_equal(pk_gradient_prepare(&context, &p.graph, 300, &workspace), PK_MEMORY);
    context.memory_limit = 1024;
    assert_int_equal(pk_gradient_prepare(&context, &p.graph, 300, &workspace), PK_MEMORY_LIMIT);
    context.memory_limit = 0;
    assert_int_equal(pk_gradient_prepare(&context, &p.graph, 0, &workspace), PK_ARGUMENT);
    assert_int_equal(pk_gradient_prepare(&context, NULL, 1, &workspace), PK_ARGUMENT);
    assert_memory_equal(&workspace, &untouched, sizeof workspace);
    count.left = 1000;
    assert_int_equal(pk_gradient_prepare(&context, &p.graph, SIZE_MAX, &workspace), PK_OK);
    pk_gradient_release(&context, &workspace);
    assert_int_equal(pk_gradient_prepare(&context, &p.graph, 300, &workspace), PK_OK);
    pk_batch batch = {300, p.items, NULL};
    count.calls = 0;
    assert_int_equal(pk_batch_gradient(&context, &p.graph, PK_SQUARED, p.weights, &p.data, &batch, &workspace,
                                       NULL, p.gradient),
                     PK_OK);
    assert_int_equal(count.calls, 0);
    pk_gradient_release(&context, &workspace);
    pk_gradient_release(&context, &workspace);
    pk_gradient_release(&context, NULL);
    assert_int_equal(context.memory_used, 0);
    problem_free(&p);
}

static void batch_errors(void **state)
{
    (void)state;
    problem p, q;
    pk_context context = zero_context();
    pk_gradient_workspace workspace;
    double objective = 5;
    problem_make("input 6; dense 9; tanh; dense 4", PK_SQUARED, 100, &p);
    problem_make("input 5; dense 9; tanh; dense 3", PK_SQUARED, 100, &q);
    assert_int_equal(pk_gradient_prepare(&context, &p.graph, 300, &workspace), PK_OK);
    int64_t good = p.items[150];
    pk_batch batch = {300, p.items, NULL}, more = {301, p.items, NULL}, none = {2, NULL, NULL};
    size_t bytes = p.graph.parameters * sizeof(pk_real);
    memset(p.gradient, 3, bytes);
    memset(p.other, 3, bytes);
#define GRADIENT(graph, loss, w, data, batch, ws, g) \
    pk_batch_gradient(&context, graph, loss, w, data, batch, ws, &objective, g)
    assert_int_equal(GRADIENT(NULL, PK_HUBER, p.weights, &p.data, &batch, &workspace, p.gradient), PK_ARGUMENT);
    assert_int_equal(GRADIENT(&p.graph, (pk_loss)0, p.weights, &p.data, &batch, &workspace, p.gradient),
                     PK_ARGUMENT);
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, NULL, &p.data, &batch, &workspace, p.gradient), PK_ARGUMENT);
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, NULL, &batch, &workspace, p.gradient),
                     PK_ARGUMENT);
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &p.data, NULL, &workspace, p.gradient),
                     PK_ARGUMENT);
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &p.data, &none, &workspace, p.gradient),
                     PK_ARGUMENT);
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &p.data, &more, &workspace, p.gradient),
                     PK_ARGUMENT);
    assert_int_equal(GRADIENT(&q.graph, PK_HUBER, p.weights, &q.data, &batch, &workspace, p.gradient),
                     PK_ARGUMENT);
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &q.data, &batch, &workspace, p.gradient),
                     PK_SHAPE);
    pk_dataset mixed = p.data;
    mixed.targets = q.data.targets;
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &mixed, &batch, &workspace, p.gradient), PK_SHAPE);
    for (int i = 0; i < 2; i++) {
        p.items[150] = i ? -1 : 100;
        assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &p.data, &batch, &workspace, p.gradient),
                         PK_ARGUMENT);
        assert_non_null(strstr(pk_message(&context), "batch position 150 is example"));
    }
    p.items[150] = good;
    assert_true(objective == 5 && memcmp(p.gradient, p.other, bytes) == 0);

    pk_batch empty = {0, NULL, NULL};
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &p.data, &empty, &workspace, p.gradient), PK_OK);
    memset(p.other, 0, bytes);
    assert_true(objective == 0 && memcmp(p.gradient, p.other, bytes) == 0);

    p.items[150] = p.items[290] = 7;
    for (int b = 0; b < 300; b++)
        p.items[b] = b != 150 && b != 290 && p.items[b] == 7 ? 8 : p.items[b];
    double input = p.inputs[7 * 6 + 2];
    p.inputs[7 * 6 + 2] = NAN;
    assert_int_equal(GRADIENT(&p.graph, PK_HUBER, p.weights, &p.data, &batch, &workspace, p.gradient),
                     PK_NOT_FINITE);
    assert_non_null(strstr(pk_message(&context), "not finite at batch position 150 (example 7)"));
    p.inputs[7 * 6 + 2] = input;
    ((double *)p.targets)[7 * 4] = sizeof(pk_real) == 8 ? 1e200 : 1e300; /* its square overflows */
    assert_int_equal(GRADIENT(&p.graph, PK_SQUARED, p.weights, &p.data, &batch, &workspace, p.gradient),
                     PK_NOT_FINITE);
    assert_non_null(strstr(pk_message(&context), "the objective is not finite"));
    ((double *)p.targets)[7 * 4] = 0;
    assert_int_equal(
        GRADIENT(&p.graph, PK_BINARY_CROSS_ENTROPY, p.weights, &p.data, &batch, &workspace, p.gradient),
        PK_NOT_FINITE);
    assert_non_null(strstr(pk_message(&context), "takes outputs in [0, 1], such as those of sigmoid"));
    pk_gradient_release(&context, &workspace);
    problem_free(&p);
    problem_free(&q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_torch),
        cmocka_unit_test(options_against_torch),
        cmocka_unit_test(means_of_weighted_labels),
        cmocka_unit_test(options_are_parsed),
        cmocka_unit_test(options_are_checked),
        cmocka_unit_test(against_definition),
        cmocka_unit_test(hessian_against_definition),
        cmocka_unit_test(small_residuals),
        cmocka_unit_test(not_finite_outputs_show),
        cmocka_unit_test(names),
        cmocka_unit_test(targets_are_checked),
        cmocka_unit_test(targets_become_vectors),
        cmocka_unit_test(batch_against_naive),
        cmocka_unit_test(batch_against_differences),
        cmocka_unit_test(same_bits_for_any_threads),
        cmocka_unit_test(layers_in_tiles),
        cmocka_unit_test(batch_memory),
        cmocka_unit_test(batch_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
