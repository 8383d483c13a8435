/* The network along a step: values, tangents and cotangents against long double, and every kink found. */
#include "fixture.h"

/* A segment with memory of its own, filled with rubbish first. */
typedef struct holder {
    pk_context context;
    pk_graph graph;
    pk__path segment;
    pk__pieces from, to;
    unsigned char *memory;
} holder;

static void layout(holder *h, pk__arena *arena, size_t rows, size_t points, size_t copies, size_t pieces)
{
    pk__path_take(arena, &h->graph, rows, points, points, copies, pieces, 1, &h->segment);
    pk__pieces_take(arena, pieces, &h->from);
    pk__pieces_take(arena, pieces, &h->to);
}

static void hold(holder *h, const char *network, size_t rows, size_t points, size_t copies, size_t pieces)
{
    pk__arena arena = {NULL, 0, 0, 0};
    memset(h, 0, sizeof *h);
    assert_ok(&h->context, pk_network_parse(&h->context, network, &h->graph));
    layout(h, &arena, rows, points, copies, pieces);
    assert_false(arena.overflow);
    assert_ok(&h->context, pk_allocate(&h->context, arena.used, 1, "a segment", &h->memory));
    memset(h->memory, 0xff, arena.used); /* NaN */
    pk__arena own = {h->memory, arena.used, 0, 0};
    layout(h, &own, rows, points, copies, pieces);
    assert_false(own.overflow);
    assert_true(own.used == arena.used);
}

static void drop(holder *h)
{
    pk_release(&h->context, h->memory);
    pk_graph_release(&h->context, &h->graph);
    assert_int_equal(h->context.memory_used, 0);
}

/* The kinks of one row, by the oracle: sampling and bisection in long double. */
static bf_real *oracle_kinks(const bf_network *net, const pk_real *w, const pk_real *d, const pk_real *x,
                             size_t *count)
{
    bf_path path;
    bf_real *kinks;
    memset(&path, 0, sizeof path);
    path.net = net;
    path.parameters = bf_parameters(net);
    path.outputs = bf_outputs(net);
    path.from = bf_extend(path.parameters, w);
    path.change = bf_extend(path.parameters, d);
    path.at = BF_NEW(bf_real, path.parameters);
    path.kinks = bf_kink_functions(net);
    bf_forward(net, path.from, x, &path.tape);
    *count = bf_find_kinks(&path, &kinks);
    free(path.from);
    free(path.change);
    free(path.at);
    return kinks;
}

/* Pieces tile [0, 1] for each row, in order. */
static void check_tiling(const pk__pieces *pieces, size_t rows)
{
    double *end = FIXTURE_NEW(double, rows);
    for (size_t i = 0; i < pieces->count; i++) {
        assert_true(pieces->piece[i].row < rows);
        assert_true(pieces->piece[i].a == end[pieces->piece[i].row]);
        assert_true(pieces->piece[i].b > pieces->piece[i].a);
        end[pieces->piece[i].row] = pieces->piece[i].b;
    }
    for (size_t r = 0; r < rows; r++)
        assert_true(end[r] == 1);
    free(end);
}

static double worst_kink; /* distance over what rounding allows */
static size_t kinks_seen, pieces_seen;

/* Every kink of the oracle is a border to rounding, and there are no more borders than kinks. */
static void check_kinks(const char *network, const pk_real *w, const pk_real *d, size_t rows, const pk_real *x)
{
    holder h;
    const bf_network net = fixture_network(network);
    hold(&h, network, rows, 64, 1, 4096);
    pk__path_begin(&h.segment, w, d, NULL, rows, x);
    for (size_t r = 0; r < rows; r++)
        pk__pieces_push(&h.from, r, 0, 1);
    assert_int_equal(pk__path_split(&h.segment, &h.from, &h.to), 1);
    check_tiling(&h.to, rows);
    pieces_seen += h.to.count;
    for (size_t r = 0; r < rows; r++) {
        size_t count;
        bf_real *kinks = oracle_kinks(&net, w, d, x + r * net.inputs, &count);
        kinks_seen += count;
        size_t own = 0;
        for (size_t i = 0; i < h.to.count; i++)
            own += h.to.piece[i].row == r;
        assert_true(own <= count + 1);
        for (size_t k = 0; k < count; k++) {
            double nearest = fmin((double)kinks[k], 1 - (double)kinks[k]), slack = 0;
            for (size_t i = 0; i < h.to.count; i++) {
                if (h.to.piece[i].row != r)
                    continue;
                double apart = (double)fabsl((long double)(kinks[k] - (bf_real)h.to.piece[i].a));
                if (apart < nearest) {
                    nearest = apart;
                    slack = h.to.piece[i].slack_a;
                }
            }
            /* Where a pre-activation is nearly flat at its zero, rounding moves the zero; slack says how far. */
            if (!(nearest <= ROUNDING(1e-11)) && !(nearest <= slack))
                fail_msg("%s, row %zu: the kink at %.17g is missed by %.3g (slack %.3g)", network, r,
                         (double)kinks[k], nearest, slack);
            if (nearest <= ROUNDING(1e-11))
                worst_kink = fmax(worst_kink, nearest);
        }
        free(kinks);
    }
    drop(&h);
}

static void random_line(const char *network, uint64_t seed, double far, size_t rows, pk_real **w, pk_real **d,
                        pk_real **x)
{
    const bf_network net = fixture_network(network);
    const size_t P = bf_parameters(&net);
    *w = fixture_normals(seed, P, 0.7);
    *d = fixture_normals(seed + 1000, P, far);
    *x = fixture_normals(seed + 2000, rows * net.inputs, 1);
}

static void test_random_networks(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 3; dense 6; relu; dense 2",
        "input 3; dense 6; relu; dense 6; relu; dense 2",
        "input 3; dense 6; leaky_relu 0.1; dense 6; relu; dense 6; leaky_relu 0.5; dense 2",
        "input 3; dense 5; hard_tanh; dense 5; hard_tanh; dense 2",
        "input 3; dense 5; abs; dense 5; abs; dense 5; abs; dense 5; abs; dense 1",
        "input 3; dense 4; relu; dense 4; relu; dense 4; relu; dense 4; relu; dense 4; relu; dense 2",
        "input 2; dense 4; abs; dense 4 nobias; hard_tanh; dense 4; relu; dense 1; relu",
        "input 2; dense 4; dense 4; relu; dense 3; dense 3; abs; dense 1", /* degree grows without kinks */
    };
    static const double far[] = {1e-3, 0.5, 3, 50};
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
        for (size_t f = 0; f < sizeof far / sizeof *far; f++)
            for (uint64_t seed = 0; seed < 4; seed++) {
                pk_real *w, *d, *x;
                random_line(networks[n], 100 * n + 10 * f + seed, far[f], 3, &w, &d, &x);
                check_kinks(networks[n], w, d, 3, x);
                free(w), free(d), free(x);
            }
    print_message("%zu kinks, %zu pieces; the worst is off by %.3g\n", kinks_seen, pieces_seen, worst_kink);
}

/* Counts the borders inside (0, 1) of a one-row split. */
static size_t borders(const char *network, const pk_real *w, const pk_real *d, const pk_real *x, double *where)
{
    holder h;
    size_t count = 0;
    hold(&h, network, 1, 1, 1, 256); /* room for the samples of a piece is always taken */
    pk__path_begin(&h.segment, w, d, NULL, 1, x);
    pk__pieces_push(&h.from, 0, 0, 1);
    assert_int_equal(pk__path_split(&h.segment, &h.from, &h.to), 1);
    check_tiling(&h.to, 1);
    for (size_t i = 1; i < h.to.count; i++)
        where[count++] = h.to.piece[i].a;
    drop(&h);
    return count;
}

static void test_special_kinks(void **state)
{
    (void)state;
    double at[256];
    const pk_real one[2] = {1, 0};
    {
        /* z = -1/4 + t crosses at exactly 1/4 */
        const pk_real w[] = {0, -0.25}, d[] = {1, 0};
        assert_int_equal(borders("input 1; dense 1; relu", w, d, one, at), 1);
        assert_close(at[0], 0.25, 0);
    }
    {
        /* a step of length zero; identically zero pre-activations; dead units */
        const pk_real w[] = {1, 1, -2, -3, 0, 0}, d[] = {0, 0, 0, 0, 0, 0};
        assert_int_equal(borders("input 2; dense 2; relu", w, d, one, at), 0);
        const pk_real zero[] = {0, 1, 0, 2, 0, 0}, still[] = {0, 3, 0, -5, 0, 0}; /* x_1 = 0 */
        assert_int_equal(borders("input 2; dense 2; abs", zero, still, one, at), 0);
    }
    {
        /* two units at one t, the third a bit later */
        const pk_real w[] = {-1, -2, -1, 0, 0, -0.001}, d[] = {4, 8, 4, 0, 0, 0};
        assert_int_equal(borders("input 1; dense 3; relu", w, d, one, at), 2);
        assert_close(at[0], 0.25, ROUNDING(1e-15));
        assert_close(at[1], 0.25025, ROUNDING(1e-15));
    }
    {
        /* zero at either end only: nothing inside */
        const pk_real w[] = {0, 0}, d[] = {1, 0}, back[] = {1, 0}, down[] = {-1, 0};
        assert_int_equal(borders("input 1; dense 1; relu", w, d, one, at), 0);
        assert_int_equal(borders("input 1; dense 1; relu", back, down, one, at), 0);
    }
    {
        /* second layer (t - 1/2) t: the first unit is t (never negative), w2 = t - 1/2: crosses at 1/2 */
        const pk_real w[] = {0, 0, -0.5, 0}, d[] = {1, 0, 1, 0};
        size_t count = borders("input 1; dense 1; relu; dense 1; relu", w, d, one, at);
        assert_true(count >= 1);
        assert_close(at[count - 1], 0.5, ROUNDING(1e-15));
    }
    {
        /* second layer (t - 1/2)^2 + e: touches zero (e = 0), misses it (e > 0), crosses twice (e < 0).
         * Through dense; dense: value = w2 (x w1 + b1) + b2 with w1 = w2 = t - 1/2. */
        const double e[] = {0, EITHER(1e-12, 1e-4), EITHER(-1e-12, -1e-4), EITHER(-1e-4, -1e-2)};
        const double crossings[] = {EITHER(1e-6, 1e-2), EITHER(1e-2, 1e-1)};
        for (int k = 0; k < 4; k++) {
            const pk_real w[] = {-0.5, 0, -0.5, e[k]}, d[] = {1, 0, 1, 0};
            size_t count = borders("input 1; dense 1; dense 1; relu", w, d, one, at);
            if (k == 1)
                assert_int_equal(count, 0);
            if (k == 0) /* one split or none is the same here */
                for (size_t i = 0; i < count; i++)
                    assert_close(at[i], 0.5, ROUNDING(1e-7));
            if (k >= 2) {
                assert_int_equal(count, 2);
                assert_close(at[0], 0.5 - crossings[k - 2], ROUNDING(1e-9));
                assert_close(at[1], 0.5 + crossings[k - 2], ROUNDING(1e-9));
            }
        }
    }
    {
        /* a flat triple zero: (t - 1/3)^3 through four layers crosses once */
        const pk_real third = (pk_real)(1.0 / 3);
        const pk_real w[] = {-third, 0, -third, 0, -third, 0}, d[] = {1, 0, 1, 0, 1, 0};
        size_t count = borders("input 1; dense 1; dense 1; dense 1; abs", w, d, one, at);
        assert_true(count >= 1);
        for (size_t i = 0; i < count; i++)
            assert_close(at[i], third, EITHER(1e-5, 1e-2)); /* the cube root of rounding */
    }
    {
        /* a kink that a kink of the layer below makes: |t - 1/2| - 1/4 crosses at 1/4 and 3/4 */
        const pk_real w[] = {-0.5, 0, 1, -0.25}, d[] = {1, 0, 0, 0};
        assert_int_equal(borders("input 1; dense 1; abs; dense 1; relu", w, d, one, at), 3);
        assert_close(at[0], 0.25, ROUNDING(1e-15));
        assert_close(at[1], 0.5, ROUNDING(1e-15));
        assert_close(at[2], 0.75, ROUNDING(1e-15));
        /* and touches at the kink: |t - 1/2|: split once, the second relu sees no sign change */
        const pk_real touch[] = {-0.5, 0, 1, 0};
        assert_int_equal(borders("input 1; dense 1; abs; dense 1; relu", touch, d, one, at), 1);
    }
    {
        /* scales from denormal to huge */
        for (int exponent = -EITHER(300, 60); exponent <= EITHER(300, 60); exponent += EITHER(100, 20)) {
            const double s = ldexp(1, exponent);
            const pk_real w[] = {-0.3 * s, 0, 1, 0}, d[] = {s, 0, 0, 0};
            size_t count = borders("input 1; dense 1; relu; dense 1; relu", w, d, one, at);
            assert_int_equal(count, 1);
            assert_close(at[0], 0.3, ROUNDING(1e-15));
        }
    }
}

/* Kinks in crowds: too many for the room are reported, none is lost where there is room. */
static void test_capacity(void **state)
{
    (void)state;
    enum { UNITS = 300 };
    pk_real w[2 * UNITS + UNITS + 1], d[2 * UNITS + UNITS + 1];
    const pk_real x = 1;
    memset(w, 0, sizeof w);
    memset(d, 0, sizeof d);
    for (int j = 0; j < UNITS; j++) {
        w[j] = -(j + 0.5) / UNITS;
        d[j] = 1;
    }
    for (size_t capacity = 1; capacity <= UNITS + 5; capacity += capacity < UNITS - 4 ? 37 : 1) {
        holder h;
        hold(&h, "input 1; dense 300; relu; dense 1", 1, 64, 1, capacity);
        pk__path_begin(&h.segment, w, d, NULL, 1, &x);
        pk__pieces_push(&h.from, 0, 0, 1);
        int fits = pk__path_split(&h.segment, &h.from, &h.to);
        assert_int_equal(fits, capacity >= UNITS + 1);
        if (fits) {
            assert_int_equal(h.to.count, UNITS + 1);
            for (int j = 0; j < UNITS; j++)
                assert_close(h.to.piece[j].b, (j + 0.5) / UNITS, ROUNDING(1e-15));
        }
        drop(&h);
    }
}

/* Values, tangents and gradients at points of many rows against long double. */
static void test_points(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 3; dense 5; relu; dense 4; tanh; dense 2",
        "input 3; dense 5; gelu; dense 4 nobias; abs; dense 2",
        "input 3; tanh; dense 4; silu; dense 2; hard_tanh", /* an activation of the data */
        "input 3; identity; dense 4; dense 2",
        "input 3; dense 2",
    };
    enum { R = 3, POINTS = 7 };
    for (size_t turn = 0; turn < 2 * (sizeof networks / sizeof *networks); turn++) {
        holder h;
        pk_real *w, *d, *x, *transposed = NULL;
        const size_t n = turn / 2;
        const char *text = n == 2 || n == 3 ? strchr(strchr(networks[n], ';') + 1, ';') : NULL;
        char stripped[120];
        snprintf(stripped, sizeof stripped, "input 3%s", text ? text : strchr(networks[n], ';'));
        const bf_network net = fixture_network(stripped);
        random_line(stripped, 40 + n, 0.8, R, &w, &d, &x);
        hold(&h, networks[n], R, POINTS, 2, 8);
        assert_int_equal(h.graph.parameters, bf_parameters(&net));
        const size_t P = h.graph.parameters, C = h.graph.output_width;
        const size_t row[POINTS] = {2, 0, 0, 1, 2, 2, 1};
        const pk_real t[POINTS] = {0, 1, 0.3, 0.25, 0.9, 1e-3, 0.5};
        if (turn % 2) { /* once more with the matrices transposed */
            assert_true(pk__pass_transposes(&h.graph));
            transposed = FIXTURE_NEW(pk_real, 2 * P);
            pk__pass_transpose(&h.graph, w, transposed);
            pk__pass_transpose(&h.graph, d, transposed + P);
        }
        pk__path_begin(&h.segment, w, d, transposed, R, x);
        /* In two parts with others before them, as a rule that is tried again leaves its nodes; then moved together. */
        const pk_real other = (pk_real)0.7;
        assert_int_equal(pk__path_append(&h.segment, 1, row, &other), 0);
        assert_int_equal(pk__path_append(&h.segment, 3, row, t), 1);
        assert_int_equal(pk__path_append(&h.segment, 1, row, &other), 4);
        assert_int_equal(pk__path_append(&h.segment, POINTS - 3, row + 3, t + 3), 5);
        pk__path_forward(&h.segment, POINTS, row, t);
        assert_int_equal(h.segment.held, POINTS);
        pk__path_tangent(&h.segment, 0, POINTS, row, t);
        pk_real *seed = pk__pass_seed(&h.segment.tape);
        for (size_t p = 0; p < POINTS; p++)
            for (size_t k = 0; k < 2; k++)
                for (size_t c = 0; c < C; c++)
                    seed[(p * 2 + k) * C + c] = c == k;
        pk__path_reverse(&h.segment, POINTS, t, 2);
        for (size_t p = 0; p < POINTS; p++) {
            pk_real *at = FIXTURE_NEW(pk_real, P), data[3];
            bf_real *f = BF_NEW(bf_real, C), *jacobian = BF_NEW(bf_real, C * P);
            for (size_t i = 0; i < P; i++)
                at[i] = w[i] + t[p] * d[i];
            for (size_t i = 0; i < 3; i++)
                data[i] = n == 2 ? tanh(x[row[p] * 3 + i]) : x[row[p] * 3 + i];
            bf_evaluate(&net, at, data, f, jacobian);
            for (size_t c = 0; c < C; c++) {
                bf_real along = 0;
                for (size_t i = 0; i < P; i++)
                    along += jacobian[c * P + i] * (bf_real)d[i];
                assert_close(pk__pass_output(&h.segment.tape)[p * C + c], (double)f[c], ROUNDING(1e-14));
                assert_close(h.segment.tape.tangent[h.graph.node_count - 1][p * C + c], (double)along,
                             ROUNDING(1e-13));
                /* d f_c / d bias of the last layer's input: the cotangent itself. */
                const pk_node *first = pk_graph_layer(&h.graph, 0);
                const pk_real *delta =
                    h.segment.tape.cotangent[first - h.graph.nodes] + (p * 2 + c) * first->width;
                for (size_t j = 0; j < first->width; j++)
                    assert_close(delta[j], (double)jacobian[c * P + 3 * first->width + j], ROUNDING(1e-13));
            }
            free(at), free(f), free(jacobian);
        }
        free(w), free(d), free(x), free(transposed);
        drop(&h);
    }
}

/* Cotangents of elementwise operations stand in the place of their input's: those of the layers are the same bits. */
static void test_in_place(void **state)
{
    (void)state;
    static const char network[] = "input 3; dense 4; tanh; relu; residual( dense 4; silu ); abs; dense 4; "
                                  "residual( relu ); dense 2; tanh";
    enum { R = 5, C = 2 };
    holder h;
    hold(&h, network, R, R, C, 8);
    const size_t P = h.graph.parameters;
    pk_real *w = fixture_normals(1, P, 0.7), *d = fixture_normals(2, P, 0.7), *x = fixture_normals(3, R * 3, 1);
    const pk_real t[R] = {0, 0.25, 0.5, 0.75, 1};
    const size_t row[R] = {0, 1, 2, 3, 4};
    const pk__line line = {w, d, t};
    pk__arena measure = {NULL, 0, 0, 0};
    pk__tape apart;
    unsigned char *memory = NULL;
    pk__pass_take(&measure, &h.graph, R, C, 0, &apart);
    assert_ok(&h.context, pk_allocate(&h.context, measure.used, 1, "a tape", &memory));
    pk__arena arena = {memory, measure.used, 0, 0};
    pk__pass_take(&arena, &h.graph, R, C, 0, &apart);
    pk__path_begin(&h.segment, w, d, NULL, R, x);
    pk__path_forward(&h.segment, R, row, t);
    pk__pass_forward(&apart, &line, R, x);
    for (size_t i = 0; i < R * C * C; i++)
        pk__pass_seed(&apart)[i] = pk__pass_seed(&h.segment.tape)[i] = (pk_real)(i % 3) - (pk_real)0.5;
    pk__path_reverse(&h.segment, R, t, C);
    pk__pass_reverse(&apart, &line, R, C);
    size_t shared = 0;
    for (size_t n = 1; n < h.graph.node_count; n++) {
        const pk_node *node = &h.graph.nodes[n];
        shared += h.segment.tape.cotangent[n] == h.segment.tape.cotangent[node->inputs[0]];
        if (node->weight_count)
            assert_memory_equal(h.segment.tape.cotangent[n], apart.cotangent[n],
                                R * C * node->width * sizeof(pk_real));
    }
    assert_int_equal(
        shared,
        4); /* tanh, relu, silu, abs: dense 4 behind it has two readers, and the last one is the output */
    pk_release(&h.context, memory);
    free(w), free(d), free(x);
    drop(&h);
}

/* Weights that overflow inside: split ends, whatever it finds. */
static void test_not_finite(void **state)
{
    (void)state;
    static const double sizes[] = {EITHER(1e150, 1e15), EITHER(1e300, 1e30), EITHER(1e308, 1e38)};
    for (int k = 0; k < 3; k++)
        for (uint64_t seed = 0; seed < 5; seed++) {
            holder h;
            pk_real *w, *d, *x;
            const char *network =
                "input 3; dense 5; relu; dense 5; abs; dense 5; hard_tanh; dense 5; relu; dense 2";
            random_line(network, seed, sizes[k], 2, &w, &d, &x);
            hold(&h, network, 2, 64, 1, 512);
            pk__path_begin(&h.segment, w, d, NULL, 2, x);
            for (size_t r = 0; r < 2; r++)
                pk__pieces_push(&h.from, r, 0, 1);
            if (pk__path_split(&h.segment, &h.from, &h.to))
                check_tiling(&h.to, 2);
            free(w), free(d), free(x);
            drop(&h);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_networks), cmocka_unit_test(test_special_kinks),
        cmocka_unit_test(test_capacity),        cmocka_unit_test(test_points),
        cmocka_unit_test(test_in_place),        cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
