/* Optimisers and schedules against PyTorch; the linear form against the update, and in reverse time. */
#include <float.h>
#include <locale.h>
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

enum { P = 4, STEPS = 200, CASES = 37 };

typedef struct constant {
    double weights[3][P]; /* after steps 1, 20 and 200 */
} constant;

/* PyTorch 2.15, float64: python3 optimizer_constants.py, which reads
 *   import torch
 *   torch.set_default_dtype(torch.float64)
 *   O, S = torch.optim, torch.optim.lr_scheduler
 *   sgd = lambda rate, momentum=0, **keys: (lambda p: O.SGD(p, rate, momentum, **keys))
 *   adam = lambda **keys: (lambda p: O.Adam(p, 0.01, **keys))
 *   adamw = lambda **keys: (lambda p: O.AdamW(p, 0.01, **keys))
 *   CASES = [  # optimiser, clipping, schedule
 *       (sgd(0.1), 0, None),
 *       (sgd(0.1, weight_decay=0.05), 0, None),
 *       (sgd(0.02, 0.9), 0, None),
 *       (sgd(0.02, 0.9, dampening=0.3), 0, None),
 *       (sgd(0.02, 0.8, nesterov=True), 0, None),
 *       (sgd(0.02, 0.9, nesterov=True, weight_decay=0.05), 0, None),
 *       (sgd(0.02, 0.9, dampening=0.1, weight_decay=0.001), 0, None),
 *       (adam(), 0, None),
 *       (adam(betas=(0.3, 0.95), eps=1e-3), 0, None),
 *       (adam(betas=(0.0, 0.9)), 0, None),
 *       (adam(weight_decay=0.1), 0, None),
 *       (adamw(), 0, None),
 *       (adamw(betas=(0.9, 0.98), weight_decay=0.3), 0, None),
 *       (sgd(0.02, 0.9), 0.5, None),
 *       (adamw(weight_decay=0.1), 3, None),
 *       (sgd(0.1), 0, lambda o: S.StepLR(o, 30, 0.7)),
 *       (sgd(0.05, 0.9), 0, lambda o: S.CosineAnnealingLR(o, 120, 0.001)),
 *       (adamw(), 0, lambda o: S.LinearLR(o, 0.25, 1, 40)),
 *       (sgd(0.1), 0, lambda o: S.CyclicLR(o, 0.01, 0.1, 25, 50, cycle_momentum=False)),
 *       (adam(), 0, lambda o: S.ChainedScheduler([S.LinearLR(o, total_iters=20), S.StepLR(o, 50)])),
 *   ]
 *   H = torch.tensor([[1, .5, 0, .25], [.5, 2, -.5, 0], [0, -.5, 1.5, .125], [.25, 0, .125, .75]])
 *   goal = torch.tensor([1, -2, .5, 3.])
 *   for make, clip, schedule in CASES:
 *       w = torch.tensor([.5, .25, -1, 2.], requires_grad=True)
 *       optimizer = make([w])
 *       scheduler = schedule(optimizer) if schedule else None
 *       for s in range(200):
 *           noise = torch.tensor([float((7 * s + 3 * i) % 11 - 5) for i in range(4)])
 *           w.grad = H @ (w.detach() - goal) + noise
 *           if clip:
 *               torch.nn.utils.clip_grad_norm_([w], clip)
 *           optimizer.step()
 *           if scheduler:
 *               scheduler.step()
 *           if s + 1 in (1, 20, 200):
 *               numbers = ", ".join(map(repr, w.tolist()))
 *               print(("    {{{" if s == 0 else "     {") + numbers + ("}}}," if s == 199 else "},"))
 * The cases from 20 on are those of RMSprop, Adagrad, NAdam, amsgrad and maximize, with the options of `settings` below, made
 * likewise.
 */
/* clang-format off */
static const constant constants[CASES] = {
    {{{0.9625, -0.05000000000000002, -0.75, 1.70625},
     {1.047007348082742, -1.9263550345211446, 0.7044734489492935, 2.718029410438325},
     {1.1688514895277005, -2.2286978545813265, 0.6178062315147992, 2.702124913218864}}},
    {{{0.96, -0.05125000000000003, -0.745, 1.69625},
     {1.0188016511553075, -1.8720622044529642, 0.7106399070520807, 2.586525873382711},
     {1.1344116207293578, -2.171180055977604, 0.6359438889392663, 2.5229062090492707}}},
    {{{0.5925, 0.19, -0.95, 1.94125},
     {1.2615695955078308, -2.342598374001228, 0.9067818365954123, 3.2880346557560314},
     {1.042358730391514, -1.9041689908053268, 0.5475703579654151, 2.9241005666355884}}},
    {{{0.5925, 0.19, -0.95, 1.94125},
     {1.0923368793438495, -2.710620526154451, 1.1378538070068218, 2.984532688173656},
     {1.0282556021801799, -1.9363242386120825, 0.5339654772253563, 2.9473585037485543}}},
    {{{0.6665, 0.142, -0.91, 1.89425},
     {0.9195449450688143, -2.13426365619188, 0.7597421818454675, 2.9350153745940264},
     {1.0879593683642004, -1.9511817783332635, 0.5401861463607727, 2.8685071072885995}}},
    {{{0.6748, 0.13552499999999998, -0.9031, 1.884575},
     {1.1870910990449184, -2.1613549215712555, 0.8228224200172133, 3.0260735494495643},
     {1.0481811920752309, -1.871159686164846, 0.5734154164668994, 2.688953912612242}}},
    {{{0.59249, 0.189995, -0.94998, 1.94121},
     {1.2066073065814134, -2.485726272082679, 1.0040151930787344, 3.2009945906246506},
     {1.0368055461413634, -1.9140770102052567, 0.5435384143346746, 2.928087328840454}}},
    {{{0.5099999999783784, 0.24000000003333333, -0.99000000004, 1.9900000000340425},
     {0.4952976816646951, 0.07975684723677431, -0.8454321059433008, 2.043751075927653},
     {0.4748968933261935, -1.0340358928588949, 0.0747632212087226, 2.4779964536659094}}},
    {{{0.5099978383052313, 0.24000333222259246, -0.9900039984006398, 1.9900034030968181},
     {0.4856987641944162, 0.08504436978275359, -0.8461768004098578, 2.053701360219701},
     {0.4878265596136949, -1.0710819607283315, 0.07633436674638773, 2.467399337080159}}},
    {{{0.5099999999783784, 0.24000000003333333, -0.99000000004, 1.9900000000340425},
     {0.4877152505468856, 0.08613058041367974, -0.8486438176046904, 2.053664110268571},
     {0.4948296735916045, -1.074669444198809, 0.07572019248057875, 2.4669202368766205}}},
    {{{0.509999999978142, 0.24000000003305785, -0.9900000000384616, 1.9900000000318725},
     {0.4925854924086475, 0.07962992727615655, -0.8438509325074929, 2.0331515161954274},
     {0.4587828045768689, -1.0191242644720448, 0.08196595632506462, 2.3747516008345944}}},
    {{{0.5099499999783784, 0.23997500003333333, -0.98990000004, 1.9898000000340426},
     {0.4943260411778549, 0.07943260590791826, -0.8436039425712334, 2.0397802949484056},
     {0.46958740493268236, -1.0253948586598367, 0.0810934635329984, 2.4411265324744758}}},
    {{{0.5084999999783784, 0.23925000003333333, -0.98700000004, 1.9840000000340425},
     {0.4669212296559019, 0.06994390831992264, -0.7922819635019134, 1.9276875356454313},
     {0.34944355995017473, -0.854608115284299, 0.22322364678408285, 1.60794063757383}}},
    {{{0.5068739864821317, 0.24554119795753623, -0.9962843316312802, 1.9956340896667542},
     {0.46977976310369896, -0.37669977504747443, -0.5468264143133494, 2.0956679217980514},
     {0.786165618419274, -1.9087926674070923, 0.6468764866507577, 2.9611865427860584}}},
    {{{0.509499999951508, 0.2397500000747585, -0.9890000000897102, 1.9880000000763491},
     {0.49254323834205865, 0.06531906505762891, -0.8195145624493944, 1.9830503165367364},
     {0.38567358109312744, -0.97709831382924, 0.19341437280449478, 1.9859038190526943}}},
    {{{0.9625, -0.05000000000000002, -0.75, 1.70625},
     {1.047007348082742, -1.9263550345211446, 0.7044734489492935, 2.718029410438325},
     {1.0014733653003738, -1.9990615454849017, 0.5109536544670757, 2.9532483359868644}}},
    {{{0.7312500000000001, 0.09999999999999999, -0.875, 1.853125},
     {0.9142476510640971, -2.054417009397359, 0.14170347464041086, 3.305719001926575},
     {1.097810036130241, -1.7876185800519508, 0.573838440188978, 2.850129518994452}}},
    {{{0.5024874999945945, 0.24749375000833332, -0.99747500001, 1.9974500000085105},
     {0.49423884922331596, 0.17697046842740988, -0.9331625245526232, 2.0207190154678907},
     {0.45178541686194307, -0.9439807951049184, 0.018124328587989996, 2.4265057253534628}}},
    {{{0.54625, 0.22, -0.975, 1.970625},
     {0.7353083062387963, -1.6485600163864647, 0.5113054633577131, 2.4983090505329706},
     {1.1123322806056586, -2.083786819632701, 0.5567037091363544, 2.826922629079363}}},
    {{{0.5033333333261262, 0.24666666667777778, -0.99666666668, 1.9966666666780142},
     {0.49126678791169887, 0.1397902242784782, -0.900280709615923, 2.0348829314742196},
     {0.46244514302337114, -0.14077724233009692, -0.6564570411754285, 2.1397017101479054}}},
    {{{0.5999999978378379, 0.15000000333333327, -0.9000000039999999, 1.9000000034042552},
     {0.506835103680006, -0.36132608214151407, -0.43830445159022113, 2.1511215522133913},
     {0.596265436126163, -1.452807460244503, 0.36222375665661793, 2.601456966341796}}},
    {{{0.5316010524055838, 0.21841038361016776, -0.9684163905131036, 1.968410110970453},
     {0.4909077819562071, -0.6825545687292265, -0.15551845105258325, 2.224482301187023},
     {0.9275498987502464, -1.878792504699818, 0.5665274727295779, 2.815468511338016}}},
    {{{0.520412414433103, 0.22958758561569573, -0.9795875856434735, 1.979587585618651},
     {0.5037796459400841, -0.09716721420334261, -0.7165616479541667, 2.080876062973268},
     {0.6907101388804265, -1.446094495376467, 0.4065604091314622, 2.6545031722539183}}},
    {{{0.6005037793395553, 0.1494962218382786, -0.8994962224983855, 1.8994962218894667},
     {0.5252085709462162, -0.8516265000417861, -0.005951977749759702, 2.288760856738951},
     {0.8311563465929513, -1.849831780743908, 0.5587261021353366, 2.8056353866522517}}},
    {{{0.4000000021390374, 0.34999999663865555, -1.0999999958333335, 2.099999996347032},
     {0.6559043746596874, 1.7376260362684164, -2.418228816371988, 1.5219139585603594},
     {4.535108945581763, 7.582774193220339, -8.07966753434771, -1.6485063147204284}}},
    {{{0.5999999999978378, 0.1500000000033333, -0.900000000004, 1.9000000000034043},
     {0.5067809803650546, -0.3519396238966147, -0.4459953444057139, 2.1480953325412093},
     {0.5580725238454292, -1.297815904413446, 0.26711493997880853, 2.5380464585890192}}},
    {{{0.5988464432344179, 0.1526586610635274, -0.9037185971745351, 1.9027060133208862},
     {0.5187095682694468, -0.17011209582907255, -0.6139814286265565, 2.069598704225604},
     {0.5043125670277644, -0.3504772323230918, -0.4649754789620552, 2.1378882532391663}}},
    {{{0.4000000000021622, 0.3499999999966667, -1.099999999996, 2.0999999999965957},
     {0.5532645144178966, 0.965187917372569, -1.6825651290053623, 1.819606680624504},
     {1.400416127528538, 3.09732219935402, -3.6975367973918316, 0.9224085456433917}}},
    {{{0.5099999999782608, 0.24000000003319502, -0.9900000000392157, 1.9900000000329219},
     {0.49436077019890207, 0.08093202343084246, -0.8490727104787528, 2.03686721188727},
     {0.4605198517299875, -0.9412286934872509, 0.0002505636836525045, 2.408336385929617}}},
    {{{0.5099499999783784, 0.23997500003333333, -0.98990000004, 1.9898000000340426},
     {0.4962897646711099, 0.09296183028331115, -0.8676857929826741, 2.0308186236732957},
     {0.45509609137075935, -0.8381255720940104, -0.11426405162206865, 2.367820881190191}}},
    {{{0.48900000002162164, 0.2594999999666667, -1.00799999996, 2.0059999999659572},
     {0.4866855986603523, 0.41054645915302657, -1.116424024907679, 1.8761637384311383},
     {0.6412506908169155, 1.804840758760789, -2.1633525423599997, 0.5784216692702047}}},
    {{{0.5105645177607118, 0.23943548225166117, -0.9894354822587041, 1.9894354822524105},
     {0.4910449320954902, 0.1066475696622099, -0.8670198287044625, 2.0434887267006627},
     {0.47275048519012136, -0.9965429391166328, 0.04455331742426644, 2.470642874602301}}},
    {{{0.5100671600936282, 0.23993283991790462, -0.9899328399239657, 1.9899328399176297},
     {0.49538844830961765, 0.15539321470039882, -0.911147132116601, 2.023094261896557},
     {0.42027213285118026, -0.8125106954710615, -0.08513564133410546, 2.349704499473126}}},
    {{{0.5103142633000425, 0.23931073671233022, -0.9889357367193731, 1.9884357367130796},
     {0.48631893142075594, 0.10489718900092937, -0.8578041830865057, 2.023713835758035},
     {0.4481352851949604, -0.9570344210060113, 0.07636060608123285, 2.2937550772281954}}},
    {{{0.48943548223904404, 0.2605645177480429, -1.010564517739535, 2.010564517744962},
     {0.509398830016995, 0.3980847739328161, -1.1370832367090302, 1.9461328065552095},
     {0.9931678454566103, 2.274913367723952, -2.8564146402054718, 1.1243026440345834}}},
    {{{0.4955825, 0.252838125, -1.0023275, 2.002695625},
     {0.5215118184217995, 0.5978668578212935, -1.2380079674912505, 1.9270386755514117},
     {3.4692504933057715, 15.196896709577533, -10.67936871426577, 0.25705628843571016}}},
    {{{0.495325, 0.252975, -1.0024, 2.0027375},
     {0.5049841232890078, 0.3547597221471772, -1.0724652599661242, 1.9765316110293796},
     {0.6225332626406427, 1.5132433087684072, -1.8537164788594664, 1.726930951675572}}},
};
/* clang-format on */

typedef struct setting {
    const char *optimizer;
    double clip;
    pk_schedule schedule;
} setting;

#define CONSTANT(rate)                                                    \
    {                                                                     \
        PK_SCHEDULE_CONSTANT, rate, 0, 0, 0, 0, 0, 0, NULL, 0, NULL, NULL \
    }
static const setting settings[CASES] = {
    {"sgd", 0, CONSTANT(0.1)},
    {"sgd weight_decay=0.05", 0, CONSTANT(0.1)},
    {"sgd momentum=0.9", 0, CONSTANT(0.02)},
    {"sgd momentum=0.9 dampening=0.3", 0, CONSTANT(0.02)},
    {"sgd momentum=0.8 nesterov=1", 0, CONSTANT(0.02)},
    {"sgd momentum=0.9 nesterov=1 weight_decay=0.05", 0, CONSTANT(0.02)},
    {"sgd momentum=0.9 dampening=0.1 weight_decay=0.001", 0, CONSTANT(0.02)},
    {"adam", 0, CONSTANT(0.01)},
    {"adam beta1=0.3 beta2=0.95 epsilon=1e-3", 0, CONSTANT(0.01)},
    {"adam beta1=0 beta2=0.9", 0, CONSTANT(0.01)},
    {"adam weight_decay=0.1", 0, CONSTANT(0.01)},
    {"adamw", 0, CONSTANT(0.01)},
    {"adamw beta1=0.9 beta2=0.98 weight_decay=0.3", 0, CONSTANT(0.01)},
    {"sgd momentum=0.9", 0.5, CONSTANT(0.02)},
    {"adamw weight_decay=0.1", 3, CONSTANT(0.01)},
    {"sgd", 0, {PK_SCHEDULE_STEP, 0.1, 0, 0.7, 30, 0, 0, 0, NULL, 0, NULL, NULL}},
    {"sgd momentum=0.9", 0, {PK_SCHEDULE_COSINE, 0.05, 0.001, 0, 120, 0, 0, 0, NULL, 0, NULL, NULL}},
    {"adamw", 0, {PK_SCHEDULE_CONSTANT, 0.01, 0, 0, 0, 0, 40, 0.25, NULL, 0, NULL, NULL}},
    {"sgd", 0, {PK_SCHEDULE_TRIANGULAR, 0.1, 0.01, 0, 25, 50, 0, 0, NULL, 0, NULL, NULL}},
    {"adam", 0, {PK_SCHEDULE_STEP, 0.01, 0, 0, 50, 0, 20, 0, NULL, 0, NULL, NULL}},
    {"rmsprop", 0, CONSTANT(0.01)},
    {"rmsprop alpha=0.9 epsilon=1e-3 weight_decay=0.05 momentum=0.8", 0, CONSTANT(0.01)},
    {"rmsprop alpha=0.4 centered=1", 0, CONSTANT(0.01)},
    {"rmsprop momentum=0.5 centered=1 weight_decay=0.01", 0, CONSTANT(0.01)},
    {"rmsprop momentum=0.5 maximize=1 weight_decay=0.1", 0, CONSTANT(0.01)},
    {"adagrad", 0, CONSTANT(0.1)},
    {"adagrad lr_decay=0.1 weight_decay=0.02 initial_accumulator_value=0.5 epsilon=1e-6", 0, CONSTANT(0.1)},
    {"adagrad maximize=1", 0, CONSTANT(0.1)},
    {"adam beta2=0.9 amsgrad=1 weight_decay=0.05", 0, CONSTANT(0.01)},
    {"adamw beta2=0.7 amsgrad=1", 0, CONSTANT(0.01)},
    {"adamw maximize=1 weight_decay=0.2", 0, CONSTANT(0.01)},
    {"nadam", 0, CONSTANT(0.01)},
    {"nadam beta1=0.99 momentum_decay=0.2 weight_decay=0.05", 0, CONSTANT(0.01)},
    {"nadam weight_decay=0.05 decoupled_weight_decay=1 momentum_decay=0", 0, CONSTANT(0.01)},
    {"nadam maximize=1 weight_decay=0.1", 0, CONSTANT(0.01)},
    {"sgd momentum=0.9 weight_decay=0.05 nesterov=1 maximize=1", 0, CONSTANT(0.0005)},
    {"sgd maximize=1 weight_decay=0.1", 0, CONSTANT(0.001)},
};

static pk_context zero_context(void)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    return context;
}

static void against_torch(void **state)
{
    (void)state;
    const double h[P][P] = {
        {1, 0.5, 0, 0.25}, {0.5, 2, -0.5, 0}, {0, -0.5, 1.5, 0.125}, {0.25, 0, 0.125, 0.75}};
    const double goal[P] = {1, -2, 0.5, 3};
    int single = sizeof(pk_real) < sizeof(double);
    for (int i = 0; i < CASES; i++) {
        pk_optimizer optimizer;
        pk_real w[P] = {0.5, 0.25, -1, 2}, gradient[P], update[P], memory[3 * P] = {0};
        assert_int_equal(pk_optimizer_parse(NULL, settings[i].optimizer, &optimizer), PK_OK);
        assert_int_equal(pk_schedule_check(NULL, &settings[i].schedule, STEPS), PK_OK);
        for (size_t s = 0; s < STEPS; s++) {
            for (size_t k = 0; k < P; k++) {
                double sum = (double)((7 * s + 3 * k) % 11) - 5;
                for (size_t j = 0; j < P; j++)
                    sum += h[k][j] * (w[j] - goal[j]);
                gradient[k] = (pk_real)sum;
            }
            double scale = settings[i].clip > 0 ? pk_clip_scale(gradient, P, settings[i].clip) : 1;
            pk_optimizer_update(&optimizer, s, pk_schedule_rate(&settings[i].schedule, s), scale, P, w,
                                gradient, memory, update);
            for (size_t k = 0; k < P; k++)
                w[k] += update[k];
            if (s == 0 || s == 19 || s == STEPS - 1) {
                const double *torch = constants[i].weights[s == 0 ? 0 : s == 19 ? 1 : 2];
                double bound = single ? 1e-4 : s == 0 ? 2 * DBL_EPSILON : 1e-12;
                for (size_t k = 0; k < P; k++)
                    if (!(fabs(w[k] - torch[k]) <= bound * fmax(s == 0   ? 1
                                                                : single ? 0.01
                                                                         : 0,
                                                                fabs(torch[k]))))
                        fail_msg("%s, case %d, step %zu, weight %zu: %.17g, not %.17g", settings[i].optimizer,
                                 i, s, k, (double)w[k], torch[k]);
            }
        }
    }
}

/* A 64-bit congruential generator, in [-1, 1). */
static double draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 11) / 4503599627370496.0 - 1;
}

/* Runs an optimiser on the sum of N made example gradients, and beside it the linear form: on the sum, on each
 * example alone with a buffer carried forward, and in reverse time. Decay is one more example. */
enum { WIDE = 37, N = 5, RUN = 25 };

typedef struct linear_run {
    double gradients[RUN][N + 1]
                    [WIDE]; /* scaled, and by p where that comes before; the last one is the coupled decay */
    double updates[RUN][WIDE], weights[RUN][WIDE], preconditioners[RUN][WIDE];
    pk_linear_form forms[RUN];
} linear_run;

static void linear_run_make(const pk_optimizer *optimizer, uint64_t seed, linear_run *run)
{
    pk_real w[WIDE], sum[WIDE], update[WIDE], memory[3 * WIDE], p[WIDE];
    for (size_t k = 0; k < 3 * WIDE; k++)
        memory[k] = 0;
    for (size_t k = 0; k < WIDE; k++)
        w[k] = (pk_real)draw(&seed);
    for (size_t s = 0; s < RUN; s++) {
        double rate = 0.01 + 0.002 * (double)(s % 4), scale = s % 3 ? 1 : 0.75;
        for (size_t k = 0; k < WIDE; k++) {
            sum[k] = 0;
            run->weights[s][k] = w[k];
            for (size_t i = 0; i < N; i++) {
                double g = draw(&seed) * (k % 5 ? 1 : 1e-3);
                sum[k] += (pk_real)g;
                run->gradients[s][i][k] = scale * g;
            }
        }
        pk_optimizer_update(optimizer, s, rate, scale, WIDE, w, sum, memory, update);
        pk_linear_form *form = &run->forms[s], scalars;
        pk_optimizer_linear_form(optimizer, s, rate, WIDE, memory, form, p);
        pk_optimizer_linear_form(optimizer, s, rate, WIDE, NULL, &scalars, NULL);
        assert_memory_equal(form, &scalars, sizeof scalars);
        for (size_t k = 0; k < WIDE; k++) {
            run->gradients[s][N][k] = form->coupled * w[k];
            assert_true(form->negated == optimizer->maximize && (form->rate < 0) == optimizer->maximize);
            run->preconditioners[s][k] = form->before ? form->rate : form->preconditioned ? p[k] : form->rate;
            for (size_t i = 0; form->before && i <= N; i++)
                run->gradients[s][i][k] *= p[k];
            run->updates[s][k] = update[k];
            w[k] += update[k];
        }
    }
}

static void linear_form_is_the_update(void **state)
{
    (void)state;
    double epsilon = sizeof(pk_real) == sizeof(double) ? DBL_EPSILON : (double)FLT_EPSILON;
    linear_run *run = (linear_run *)malloc(sizeof *run);
    assert_non_null(run);
    for (int c = 0; c < CASES; c++) {
        pk_optimizer optimizer;
        assert_int_equal(pk_optimizer_parse(NULL, settings[c].optimizer, &optimizer), PK_OK);
        linear_run_make(&optimizer, 100 + (uint64_t)c, run);
        for (size_t k = 0; k < WIDE; k++) {
            double m[N + 1] = {0}, whole = 0, size = 0;
            for (size_t s = 0; s < RUN; s++) {
                const pk_linear_form *form = &run->forms[s];
                double p = run->preconditioners[s][k], sum = 0, sizes = 0, parts = 0;
                for (size_t i = 0; i <= N; i++) {
                    double g = run->gradients[s][i][k];
                    m[i] = form->carry * m[i] + form->gain * g;
                    parts -= p * (form->enter * m[i] + form->direct * g);
                    sum += g;
                    sizes += fabs(g);
                }
                whole = form->carry * whole + form->gain * sum;
                size = form->carry * size + fabs(form->gain) * sizes;
                double decay = form->decoupled * run->weights[s][k];
                double update = -p * (form->enter * whole + form->direct * sum) - decay;
                double bound = fabs(p) * (form->enter * size + form->direct * sizes) + fabs(decay);
                assert_true(fabs(update - run->updates[s][k]) <= 16 * epsilon * bound);
                assert_true(fabs(parts - decay - run->updates[s][k]) <= 16 * epsilon * bound);
            }
        }
    }
    free(run);
}

/* sum_s <phi_s, D_s> by parts: forward with a buffer for each example, and in reverse time with
 *     R_s = carry_{s+1} R_{s+1} + enter_s p_s phi_s,
 *     A_i = - sum_s <gain_s R_s + direct_s p_s phi_s, g_{s,i}>. */
static void linear_form_in_reverse_time(void **state)
{
    (void)state;
    double tolerance = sizeof(pk_real) == sizeof(double) ? 1e-13 : 1e-4;
    linear_run *run = (linear_run *)malloc(sizeof *run);
    assert_non_null(run);
    for (int c = 0; c < CASES; c++) {
        pk_optimizer optimizer;
        assert_int_equal(pk_optimizer_parse(NULL, settings[c].optimizer, &optimizer), PK_OK);
        linear_run_make(&optimizer, 200 + (uint64_t)c, run);
        double truth = 0, parts = 0, forward[N + 1] = {0}, reverse[N + 1] = {0};
        for (size_t k = 0; k < WIDE; k++) {
            uint64_t seed = k;
            double phi[RUN], m[N + 1] = {0}, r = 0;
            for (size_t s = 0; s < RUN; s++) {
                const pk_linear_form *form = &run->forms[s];
                double p = run->preconditioners[s][k];
                phi[s] = draw(&seed);
                truth += phi[s] * run->updates[s][k];
                parts -= phi[s] * form->decoupled * run->weights[s][k];
                for (size_t i = 0; i <= N; i++) {
                    double g = run->gradients[s][i][k];
                    m[i] = form->carry * m[i] + form->gain * g;
                    forward[i] -= phi[s] * p * (form->enter * m[i] + form->direct * g);
                }
            }
            for (size_t s = RUN; s-- > 0;) {
                const pk_linear_form *form = &run->forms[s];
                double p = run->preconditioners[s][k];
                r = (s + 1 < RUN ? run->forms[s + 1].carry * r : 0) + form->enter * p * phi[s];
                for (size_t i = 0; i <= N; i++)
                    reverse[i] -= (form->gain * r + form->direct * p * phi[s]) * run->gradients[s][i][k];
            }
        }
        for (size_t i = 0; i <= N; i++) {
            parts += reverse[i];
            assert_true(fabs(forward[i] - reverse[i]) <= tolerance * RUN * WIDE);
        }
        assert_true(fabs(truth - parts) <= tolerance * RUN * WIDE);
    }
    free(run);
}

static void state_and_defaults(void **state)
{
    (void)state;
    pk_optimizer zero, optimizer;
    memset(&zero, 0, sizeof zero);
    assert_int_equal(pk_optimizer_check(NULL, &zero), PK_OK);
    assert_int_equal(pk_optimizer_state_vectors(&zero), 0);
    assert_int_equal(pk_optimizer_stateless(&zero), 1);
    zero.momentum = 0.5;
    assert_int_equal(pk_optimizer_state_vectors(&zero), 1);
    assert_int_equal(pk_optimizer_stateless(&zero), 0);
    optimizer = pk_optimizer_adam();
    assert_true(optimizer.kind == PK_ADAM && optimizer.beta1 == 0.9 && optimizer.beta2 == 0.999);
    assert_true(optimizer.epsilon == 1e-8 && optimizer.weight_decay == 0);
    assert_int_equal(pk_optimizer_state_vectors(&optimizer), 2);
    optimizer = pk_optimizer_adamw();
    assert_true(optimizer.kind == PK_ADAMW && optimizer.weight_decay == 0.01 && optimizer.beta2 == 0.999);
    assert_int_equal(pk_optimizer_stateless(&optimizer), 0);
    optimizer = pk_optimizer_default(PK_SGD);
    assert_true(optimizer.momentum == 0 && optimizer.weight_decay == 0 && optimizer.nesterov == 0);

    assert_int_equal(pk_optimizer_parse(NULL, "adamw amsgrad=1", &optimizer), PK_OK);
    assert_int_equal(pk_optimizer_state_vectors(&optimizer), 3);
    optimizer = pk_optimizer_default(PK_RMSPROP);
    assert_true(optimizer.alpha == 0.99 && optimizer.epsilon == 1e-8 && optimizer.momentum == 0);
    assert_int_equal(pk_optimizer_state_vectors(&optimizer), 1);
    optimizer.momentum = 0.9, optimizer.centered = 1;
    assert_int_equal(pk_optimizer_state_vectors(&optimizer), 3);
    optimizer = pk_optimizer_default(PK_ADAGRAD);
    assert_true(optimizer.epsilon == 1e-10 && optimizer.lr_decay == 0);
    assert_int_equal(pk_optimizer_state_vectors(&optimizer), 1);
    optimizer = pk_optimizer_default(PK_NADAM);
    assert_true(optimizer.momentum_decay == 4e-3 && optimizer.beta1 == 0.9 && optimizer.weight_decay == 0);
    assert_int_equal(pk_optimizer_state_vectors(&optimizer), 2);

    /* PyTorch's product of momenta, a tensor of single precision: of one step after another. */
    pk_optimizer nadam = pk_optimizer_default(PK_NADAM), rounded = nadam;
    pk_linear_form form, other;
    float product = 1;
    rounded.float32_product = 1;
    for (size_t s = 0; s < 100; s++) {
        const double mu = 0.9 * (1 - 0.5 * pow(0.96, 0.004 * (double)(s + 1)));
        product *= (float)mu;
        pk_optimizer_linear_form(&nadam, s, 1, 1, NULL, &form, NULL);
        pk_optimizer_linear_form(&rounded, s, 1, 1, NULL, &other, NULL);
        assert_true(fabs(other.direct - (1 - mu) / (1 - (double)product)) <= 4 * DBL_EPSILON);
        assert_true(fabs(other.direct - form.direct) < 1e-6 && (s != 1 || other.direct != form.direct));
    }

    /* The first step of momentum sets the buffer, whatever it held. */
    pk_real w[1] = {1}, gradient[1] = {2}, buffer[1] = {77}, update[1];
    zero.dampening = 0.25;
    pk_optimizer_update(&zero, 0, 0.5, 1, 1, w, gradient, buffer, update);
    assert_true(buffer[0] == 2 && update[0] == -1);
    pk_optimizer_update(&zero, 1, 0.5, 1, 1, w, gradient, buffer, update);
    assert_true(buffer[0] == 2.5 && update[0] == -1.25);
}

static void parse_refuses(const char *text, pk_status status, const char *message)
{
    pk_context context = zero_context();
    pk_optimizer optimizer, before;
    memset(&optimizer, 1, sizeof optimizer);
    memset(&before, 1, sizeof before);
    assert_int_equal(pk_optimizer_parse(&context, text, &optimizer), status);
    if (!strstr(pk_message(&context), message))
        fail_msg("'%s' gives '%s', not '%s'", text ? text : "NULL", pk_message(&context), message);
    assert_memory_equal(&optimizer, &before, sizeof before);
}

/* Names and keys as the table has them: a line made of them is read, and what is not known lists them. */
static void names(void **state)
{
    (void)state;
    pk_context context = zero_context();
    pk_optimizer optimizer;
    static const size_t keys[] = {5, 6, 6, 6, 5, 8};
    int kinds = 0;
    for (; pk_optimizer_name((pk_optimizer_kind)kinds); kinds++) {
        const char *key;
        char line[256];
        snprintf(line, sizeof line, "%s unknown=1", pk_optimizer_name((pk_optimizer_kind)kinds));
        assert_int_equal(pk_optimizer_parse(&context, line, &optimizer), PK_FORMAT);
        size_t count = 0;
        for (; (key = pk_optimizer_key((pk_optimizer_kind)kinds, count)) != NULL; count++) {
            assert_non_null(strstr(pk_message(&context), key));
            snprintf(line, sizeof line, "%s %s=0", pk_optimizer_name((pk_optimizer_kind)kinds), key);
            assert_int_equal(pk_optimizer_parse(NULL, line, &optimizer), PK_OK);
            assert_int_equal(optimizer.kind, kinds);
        }
        assert_int_equal(count, keys[kinds]);
        assert_null(pk_optimizer_key((pk_optimizer_kind)kinds, count + 10));
    }
    assert_int_equal(kinds, 6);
    assert_null(pk_optimizer_key((pk_optimizer_kind)99, 0));
}

static void text(void **state)
{
    (void)state;
    pk_optimizer optimizer, again;
    char line[256];
    assert_int_equal(
        pk_optimizer_parse(NULL, " adamw \t beta2=0.98  epsilon=1E-8 weight_decay=.01 ", &optimizer), PK_OK);
    assert_true(optimizer.kind == PK_ADAMW && optimizer.beta1 == 0.9 && optimizer.beta2 == 0.98);
    assert_int_equal(pk_optimizer_format(&optimizer, line, sizeof line), PK_OK);
    assert_string_equal(line, "adamw beta1=0.9 beta2=0.98 epsilon=1e-08 weight_decay=0.01");
    assert_int_equal(pk_optimizer_format(&optimizer, line, strlen(line) + 1), PK_OK);
    assert_int_equal(pk_optimizer_format(&optimizer, line, strlen(line)), PK_ARGUMENT);
    assert_string_equal(line, "");
    assert_int_equal(pk_optimizer_format(&optimizer, NULL, 10), PK_ARGUMENT);
    memset(&optimizer, 0, sizeof optimizer);
    assert_int_equal(pk_optimizer_format(&optimizer, line, sizeof line), PK_OK);
    assert_string_equal(line, "sgd");
    optimizer.kind = (pk_optimizer_kind)2;
    assert_int_equal(pk_optimizer_format(&optimizer, line, sizeof line), PK_OK);
    assert_string_equal(line, "adamw beta1=0 beta2=0 epsilon=0 weight_decay=0");

    uint64_t seed = 1;
    for (int trial = 0; trial < 300; trial++) { /* every bit comes back */
        optimizer = pk_optimizer_default((pk_optimizer_kind)(trial % 6));
        optimizer.maximize = trial / 6 % 2;
        optimizer.weight_decay = fabs(draw(&seed)) * pow(10, 300 * draw(&seed));
        if (optimizer.kind == PK_SGD) {
            optimizer.momentum = fabs(draw(&seed));
            optimizer.nesterov = trial % 2;
            optimizer.dampening = optimizer.nesterov ? 0 : draw(&seed);
        } else if (optimizer.kind == PK_RMSPROP) {
            optimizer.alpha = fabs(draw(&seed));
            optimizer.momentum = fabs(draw(&seed));
            optimizer.centered = trial % 2;
        } else if (optimizer.kind == PK_ADAGRAD) {
            optimizer.lr_decay = fabs(draw(&seed)) * 1e-300;
            optimizer.initial_accumulator_value = fabs(draw(&seed)) * 1e-300;
            optimizer.epsilon = fabs(draw(&seed)) * 1e-300;
        } else {
            optimizer.beta1 = fabs(draw(&seed));
            optimizer.beta2 = 1 - fabs(draw(&seed)) * 1e-9;
            optimizer.epsilon = fabs(draw(&seed)) * 1e-12;
            optimizer.amsgrad = optimizer.kind != PK_NADAM && trial / 12 % 2;
            optimizer.momentum_decay = optimizer.kind == PK_NADAM ? fabs(draw(&seed)) : 0;
            optimizer.decoupled_weight_decay = optimizer.kind == PK_NADAM && trial / 12 % 2;
        }
        assert_int_equal(pk_optimizer_format(&optimizer, line, sizeof line), PK_OK);
        assert_int_equal(pk_optimizer_parse(NULL, line, &again), PK_OK);
        assert_memory_equal(&optimizer, &again, sizeof again);
    }

    parse_refuses(NULL, PK_ARGUMENT, "NULL");
    parse_refuses("", PK_FORMAT, "'' is not sgd, adam, adamw, rmsprop, adagrad or nadam");
    parse_refuses("sg", PK_FORMAT, "'sg' is not");
    parse_refuses("adamax", PK_FORMAT, "'adamax' is not");
    parse_refuses("sgd beta1=0.9", PK_FORMAT, "sgd: 'beta1=0.9' is not one of its keys");
    parse_refuses("adam momentum=0.9", PK_FORMAT, "adam: 'momentum=0.9'");
    parse_refuses("sgd momentum", PK_FORMAT, "'momentum' is not momentum=number");
    parse_refuses("sgd momentum =1", PK_FORMAT, "'momentum' is not momentum=number");
    parse_refuses("sgd momentum=", PK_FORMAT, "'momentum=' is not momentum=number");
    parse_refuses("sgd momentum=0.9x", PK_FORMAT, "'momentum=0.9x'");
    parse_refuses("sgd momentum=0,9", PK_FORMAT, "'momentum=0,9'");
    parse_refuses("sgd momentum=0x1", PK_FORMAT, "'momentum=0x1'");
    parse_refuses("sgd momentum=inf", PK_FORMAT, "'momentum=inf'");
    parse_refuses("sgd momentum=1e999", PK_FORMAT, "'momentum=1e999'");
    parse_refuses("sgd =1", PK_FORMAT, "'=1' is not one of its keys");
    parse_refuses("sgd momentum=0.9 momentum=0.9", PK_FORMAT, "gives momentum a second time");
    parse_refuses("sgd momentum=-0.1", PK_ARGUMENT, "momentum is -0.1");
    parse_refuses("sgd weight_decay=-1", PK_ARGUMENT, "weight_decay is -1; it must be finite and >= 0");
    parse_refuses("sgd momentum=0.9 nesterov=2", PK_ARGUMENT, "nesterov is 2; it must be 0 or 1");
    parse_refuses("sgd nesterov=1", PK_ARGUMENT, "nesterov needs momentum > 0");
    parse_refuses("sgd momentum=0.9 nesterov=1 dampening=0.1", PK_ARGUMENT, "nesterov needs momentum > 0");
    parse_refuses("adam beta1=1", PK_ARGUMENT, "beta1 is 1; it must be in [0, 1)");
    parse_refuses("adamw beta2=-0.5", PK_ARGUMENT, "beta2 is -0.5; it must be in [0, 1)");
    parse_refuses("adamw epsilon=-1e-8", PK_ARGUMENT, "epsilon is -1");
    parse_refuses("adam amsgrad=2", PK_ARGUMENT, "amsgrad is 2; it must be 0 or 1");
    parse_refuses("sgd amsgrad=1", PK_FORMAT, "sgd: 'amsgrad=1' is not one of its keys");
    parse_refuses("rmsprop alpha=1", PK_ARGUMENT, "alpha is 1; it must be in [0, 1)");
    parse_refuses("rmsprop beta1=0.9", PK_FORMAT, "rmsprop: 'beta1=0.9' is not one of its keys");
    parse_refuses("adagrad lr_decay=-1", PK_ARGUMENT, "lr_decay is -1");
    parse_refuses("nadam momentum_decay=-1", PK_ARGUMENT, "momentum_decay is -1");
    parse_refuses("nadam amsgrad=1", PK_FORMAT, "nadam: 'amsgrad=1' is not one of its keys");
    char huge[1024] = "sgd momentum=";
    memset(huge + strlen(huge), '1', 900);
    parse_refuses(huge, PK_FORMAT, "'momentum=1111");
    pk_context context = zero_context();
    optimizer = pk_optimizer_adam();
    optimizer.epsilon = NAN;
    assert_int_equal(pk_optimizer_check(&context, &optimizer), PK_ARGUMENT);
    optimizer.kind = (pk_optimizer_kind)7;
    assert_int_equal(pk_optimizer_check(&context, &optimizer), PK_ARGUMENT);
    assert_int_equal(pk_optimizer_format(&optimizer, line, sizeof line), PK_ARGUMENT);
    assert_int_equal(pk_optimizer_check(&context, NULL), PK_ARGUMENT);
}

static void text_in_another_locale(void **state)
{
    (void)state;
    const char *locales[3] = {"de_DE.UTF-8", "fr_FR.UTF-8", "de_DE"};
    int found = 0;
    for (int i = 0; i < 3 && !found; i++)
        found = setlocale(LC_NUMERIC, locales[i]) != NULL;
    if (!found)
        skip();
    pk_optimizer optimizer;
    char line[256];
    pk_status status = pk_optimizer_parse(NULL, "adam beta1=0.25 epsilon=1.5e-3", &optimizer);
    pk_status formatted = pk_optimizer_format(&optimizer, line, sizeof line);
    setlocale(LC_NUMERIC, "C");
    assert_int_equal(status, PK_OK);
    assert_int_equal(formatted, PK_OK);
    assert_true(optimizer.beta1 == 0.25 && optimizer.epsilon == 1.5e-3);
    assert_string_equal(line, "adam beta1=0.25 beta2=0.999 epsilon=0.0015");
}

static void clipping(void **state)
{
    (void)state;
    pk_real g[100];
    uint64_t seed = 5;
    double epsilon = sizeof(pk_real) == sizeof(double) ? DBL_EPSILON : (double)FLT_EPSILON;
    for (size_t count = 1; count <= 100; count++) {
        long double sum = 0;
        for (size_t k = 0; k < count; k++) {
            g[k] = (pk_real)draw(&seed);
            sum += (long double)g[k] * g[k];
        }
        double expected = (double)(0.125L / (sqrtl(sum) + 1e-6L));
        expected = expected < 1 ? expected : 1;
        assert_true(fabs(pk_clip_scale(g, count, 0.125) - expected) <= 4 * epsilon);
    }
    assert_true(pk_clip_scale(g, 100, 1e9) == 1);
    assert_true(pk_clip_scale(g, 0, 1) == 1);
    assert_true(pk_clip_scale(g, 100, 0) == 0);
    if (sizeof(pk_real) == sizeof(double)) { /* norms whose squares overflow or vanish */
        pk_real pair[2] = {(pk_real)3e200, (pk_real)-4e200};
        assert_true(fabs(pk_clip_scale(pair, 2, 1e200) - 0.2) <= 1e-15);
        pair[0] = (pk_real)1.2e308, pair[1] = (pk_real)0.5e308;
        assert_true(fabs(pk_clip_scale(pair, 2, 1.3e307) - 0.1) <= 1e-15);
        pair[0] = (pk_real)3e-200, pair[1] = (pk_real)4e-200;
        assert_true(fabs(pk_clip_scale(pair, 2, 1e-7) - 0.1) <= 1e-15);
        pair[0] = (pk_real)5e-324, pair[1] = 0;
        assert_true(fabs(pk_clip_scale(pair, 2, 1e-7) - 0.1) <= 1e-15);
    }
    g[0] = 0;
    assert_true(pk_clip_scale(g, 1, 1) == 1);
    for (size_t k = 0; k < 20; k++) {
        g[k] = (pk_real)NAN;
        assert_true(isnan(pk_clip_scale(g, 20, 1)));
        g[k] = (pk_real)INFINITY;
        assert_true(k > 0 || pk_clip_scale(g, 20, 1) == 0);
    }
}

static double one_over(void *user, size_t step)
{
    return *(double *)user / (1 + (double)step);
}

static void near(double value, double expected)
{
    if (!(fabs(value - expected) <= 1e-15 * fmax(1, fabs(expected))))
        fail_msg("%.17g, not %.17g", value, expected);
}

static void schedules(void **state)
{
    (void)state;
    pk_schedule s;
    memset(&s, 0, sizeof s);
    assert_int_equal(pk_schedule_check(NULL, &s, 10), PK_OK);
    s.rate = 0.5;
    near(pk_schedule_rate(&s, 12345), 0.5);
    s.warmup = 4; /* PyTorch's start: 1/3 */
    near(pk_schedule_rate(&s, 0), 0.5 / 3);
    near(pk_schedule_rate(&s, 2), 0.5 * 2 / 3);
    near(pk_schedule_rate(&s, 4), 0.5);
    s.warmup = 0;
    s.kind = PK_SCHEDULE_STEP;
    s.period = 10;
    near(pk_schedule_rate(&s, 9), 0.5);
    near(pk_schedule_rate(&s, 10), 0.05);
    near(pk_schedule_rate(&s, 25), 0.005);
    s.kind = PK_SCHEDULE_COSINE;
    s.low = 0.1;
    near(pk_schedule_rate(&s, 0), 0.5);
    near(pk_schedule_rate(&s, 5), 0.3);
    near(pk_schedule_rate(&s, 10), 0.1);
    s.kind = PK_SCHEDULE_TRIANGULAR;
    near(pk_schedule_rate(&s, 0), 0.1);
    near(pk_schedule_rate(&s, 5), 0.3);
    near(pk_schedule_rate(&s, 10), 0.5);
    near(pk_schedule_rate(&s, 15), 0.3);
    near(pk_schedule_rate(&s, 20), 0.1);
    s.period_down = 30;
    near(pk_schedule_rate(&s, 25), 0.3);
    near(pk_schedule_rate(&s, 50), 0.5);
    assert_int_equal(pk_schedule_check(NULL, &s, 100), PK_OK);

    const double rates[3] = {0.25, 0.5, 0};
    double user = 6;
    pk_context context = zero_context();
    s.kind = PK_SCHEDULE_ARRAY;
    assert_int_equal(pk_schedule_check(&context, &s, 1), PK_ARGUMENT);
    s.rates = rates;
    s.rates_count = 3;
    assert_int_equal(pk_schedule_check(&context, &s, 3), PK_OK);
    assert_int_equal(pk_schedule_check(&context, &s, 4), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "3 rates for 4 steps"));
    near(pk_schedule_rate(&s, 1), 0.5);
    near(pk_schedule_rate(&s, 99), 0);
    s.kind = PK_SCHEDULE_FUNCTION;
    assert_int_equal(pk_schedule_check(&context, &s, 4), PK_ARGUMENT);
    s.function = one_over;
    s.user = &user;
    assert_int_equal(pk_schedule_check(&context, &s, 4), PK_OK);
    near(pk_schedule_rate(&s, 2), 2);

    const double wrong[3] = {1, -1, NAN};
    s.kind = PK_SCHEDULE_ARRAY;
    s.rates = wrong;
    assert_int_equal(pk_schedule_check(&context, &s, 3), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "rate of step 1 is -1"));
    memset(&s, 0, sizeof s);
    s.rate = NAN;
    assert_int_equal(pk_schedule_check(&context, &s, 3), PK_ARGUMENT);
    s.rate = 1;
    s.kind = PK_SCHEDULE_STEP;
    assert_int_equal(pk_schedule_check(&context, &s, 3), PK_ARGUMENT);
    assert_non_null(strstr(pk_message(&context), "period is 0"));
    s.period = 1;
    s.factor = -1;
    assert_int_equal(pk_schedule_check(&context, &s, 3), PK_ARGUMENT);
    s.factor = 1e200; /* grows past every double */
    assert_int_equal(pk_schedule_check(&context, &s, 3), PK_ARGUMENT);
    s.kind = (pk_schedule_kind)17;
    assert_int_equal(pk_schedule_check(&context, &s, 3), PK_ARGUMENT);
    assert_int_equal(pk_schedule_check(&context, NULL, 3), PK_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_torch),
        cmocka_unit_test(linear_form_is_the_update),
        cmocka_unit_test(linear_form_in_reverse_time),
        cmocka_unit_test(state_and_defaults),
        cmocka_unit_test(names),
        cmocka_unit_test(text),
        cmocka_unit_test(text_in_another_locale),
        cmocka_unit_test(clipping),
        cmocka_unit_test(schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
