/* Parameter groups: lines and their errors, training against a plain loop, recording, resuming, replay, decomposition. */
#include "fixture.h"

enum { EXAMPLES = 10, STEPS = 9 };
#define NETWORK "input 3; dense 4; layer_norm; tanh; dense 2"

static pk_dataset some_data(pk_real *inputs, int64_t *targets)
{
    static const size_t shape[2] = {EXAMPLES, 3};
    pk_dataset data = {0};
    for (size_t i = 0; i < EXAMPLES * 3; i++)
        inputs[i] = (pk_real)sin(1.7 * (double)i + 0.3);
    for (size_t i = 0; i < EXAMPLES; i++)
        targets[i] = (int64_t)(i * i % 3 == 1);
    data.inputs = pk_array_view(sizeof(pk_real) == 4 ? PK_FLOAT32 : PK_FLOAT64, 2, shape, inputs);
    data.targets = pk_array_view(PK_INT64, 1, shape, targets);
    return data;
}

/* Tensors: 0: 4x3, 1: 4, 2: 4, 3: 4, 4: 2x4, 5: 2. */
static const size_t offsets[7] = {0, 12, 16, 20, 24, 32, 34};

static void lines_are_checked(void **state)
{
    static const struct {
        const char *line[2], *message;
    } cases[] = {
        {{"6 rate=1", NULL}, "tensor 6: the network has 6"},
        {{"0,0 rate=1", NULL}, "tensor 0 stands twice"},
        {{"0-2 rate=1", "2 frozen"}, "tensor 2 is in group 0 already"},
        {{"2-1 rate=1", NULL}, "the last comes before the first"},
        {{"a rate=1", NULL}, "is not a list of tensors"},
        {{"1, rate=1", NULL}, "is not a list of tensors"},
        {{"1 warmth=1", NULL}, "is not one of its keys"},
        {{"1 weight_decay=x", NULL}, "is not weight_decay=number"},
        {{"1 weight_decay=-1", NULL}, "finite and >= 0"},
        {{"1 rate=-1", NULL}, "finite and >= 0"},
        {{"1 rate=x", NULL}, "is not rate=number"},
        {{"1 rate=1 rate=2", NULL}, "a second time"},
        {{"1 frozen rate=1", NULL}, "no other key"},
        {{"1 frozen frozen", NULL}, "twice"},
    };
    (void)state;
    pk_context context = {0};
    pk_graph graph = {0};
    const pk_optimizer sgd = pk_optimizer_default(PK_SGD);
    assert_int_equal(pk_network_parse(&context, NETWORK, &graph), PK_OK);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        pk_parameter_groups groups = {0};
        assert_int_not_equal(
            pk_parameter_groups_parse(&context, &graph, &sgd, cases[c].line[1] ? 2 : 1, cases[c].line, &groups),
            PK_OK);
        if (!strstr(pk_message(&context), cases[c].message))
            fail_msg("%s: %s", cases[c].line[0], pk_message(&context));
        assert_null(groups.group);
    }
    /* Decay is coupled or decoupled for all tensors alike. */
    const pk_optimizer nadam = pk_optimizer_default(PK_NADAM);
    const char *const line = "1 decoupled_weight_decay=1";
    pk_parameter_groups none = {0};
    assert_int_equal(pk_parameter_groups_parse(&context, &graph, &nadam, 1, &line, &none), PK_UNSUPPORTED);
    assert_non_null(strstr(pk_message(&context), "decoupled_weight_decay must be the same for all tensors"));
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

/* An optimizer, the keys of the first group, and what this group's optimizer is with them. */
static const struct {
    const char *rule, *keys, *grouped;
} rules[] = {
    {"sgd", "weight_decay=0", "sgd"},
    {"sgd momentum=0.9 weight_decay=0.1", "weight_decay=0", "sgd momentum=0.9"},
    {"sgd momentum=0.9 nesterov=1", "weight_decay=0", "sgd momentum=0.9 nesterov=1"},
    {"adam weight_decay=0.1", "weight_decay=0", "adam"},
    {"adamw weight_decay=0.2", "weight_decay=0", "adamw weight_decay=0"},
    {"adam weight_decay=0.1", "amsgrad=1 beta2=0.5", "adam weight_decay=0.1 amsgrad=1 beta2=0.5"},
    {"rmsprop alpha=0.5 momentum=0.8 epsilon=1e-3", "momentum=0 maximize=1",
     "rmsprop alpha=0.5 maximize=1 epsilon=1e-3"},
    {"rmsprop alpha=0.5 weight_decay=0.1 epsilon=1e-3", "momentum=0.8",
     "rmsprop alpha=0.5 momentum=0.8 weight_decay=0.1 epsilon=1e-3"},
    {"adagrad weight_decay=0.1", "lr_decay=0.5 initial_accumulator_value=0.5",
     "adagrad weight_decay=0.1 lr_decay=0.5 initial_accumulator_value=0.5"},
    {"nadam weight_decay=0.1 decoupled_weight_decay=1", "weight_decay=0.3 maximize=1",
     "nadam weight_decay=0.3 maximize=1 decoupled_weight_decay=1"},
    {"sgd momentum=0.9 weight_decay=0.1", "maximize=1", "sgd momentum=0.9 weight_decay=0.1 maximize=1"},
};

/* A step is that of each tensor's own optimizer; recorded, resumed and replayed runs have the same bits; the decomposition
 * closes, leaves nothing unattributed, and a frozen matrix takes no part. */
static void runs_with_groups(void **state)
{
    (void)state;
    char root[] = "/tmp/pathkernel_groups_XXXXXX", remove[100];
    assert_non_null(mkdtemp(root));
    for (size_t c = 0; c < 2 * (sizeof rules / sizeof *rules); c++) {
        pk_context context = {0};
        pk_graph graph = {0};
        pk_real inputs[EXAMPLES * 3], w[3][34], start[34];
        int64_t targets[EXAMPLES];
        const pk_dataset data = some_data(inputs, targets);
        const pk_schedule rates[2] = {{.rate = 0.02, .kind = PK_SCHEDULE_COSINE, .period = STEPS}, {0}};
        const int own = c % 2;
        char first[200];
        const char *const lines[] = {first, "4 frozen"};
        snprintf(first, sizeof first, "1-3,5 %s%s", rules[c / 2].keys, own ? "" : " rate=0.5");
        pk_train_options options = {0};
        char folder[2][300];
        assert_int_equal(pk_network_parse(&context, NETWORK, &graph), PK_OK);
        assert_int_equal(pk_optimizer_parse(&context, rules[c / 2].rule, &options.optimizer), PK_OK);
        assert_int_equal(pk_loss_parse(&context, "softmax_cross_entropy", &options.loss), PK_OK);
        options.schedule.rate = 0.05;
        options.steps = STEPS;
        options.batch_size = 4;
        options.groups = lines;
        options.group_count = 2;
        options.group_schedules = own ? rates : NULL;
        for (size_t p = 0; p < 34; p++)
            w[0][p] = w[1][p] = w[2][p] = start[p] = (pk_real)(0.5 * cos(1.3 * (double)p));
        for (int k = 0; k < 2; k++) {
            snprintf(folder[k], sizeof folder[k], "%s/%zu_%d", root, c, k);
            options.record = folder[k];
            options.replace = 1;
            options.keep_every = k ? 4 : 1;
            options.steps = STEPS - 4;
            if (pk_train(&context, &graph, &data, &options, w[k], NULL))
                fail_msg("%s", pk_message(&context));
            options.replace = 0;
            options.resume = 1;
            options.steps = STEPS;
            memcpy(w[k], start, sizeof start);
            if (pk_train(&context, &graph, &data, &options, w[k], NULL))
                fail_msg("%s", pk_message(&context));
            options.resume = 0;
        }
        assert_memory_equal(w[0], w[1], sizeof w[0]);
        assert_memory_equal(w[0] + offsets[4], start + offsets[4], (offsets[5] - offsets[4]) * sizeof(pk_real));
        assert_true(w[0][offsets[5]] != start[offsets[5]]);
        /* Other groups do not go on. */
        options.record = folder[0];
        options.resume = 1;
        options.group_count = 1;
        assert_int_equal(pk_train(&context, &graph, &data, &options, w[2], NULL), PK_ARGUMENT);
        assert_non_null(strstr(pk_message(&context), "parameter groups"));
        pk_decomposition out[2];
        pk_run run;
        for (int k = 0; k < 2; k++) {
            pk_decompose_options asked = {0};
            asked.keep[0] = PK_BY_LAYER;
            asked.keep[1] = PK_BY_EXAMPLE;
            asked.bounds = 1;
            assert_int_equal(pk_run_open(&context, folder[k], &run), PK_OK);
            assert_int_equal(run.steps, STEPS);
            assert_int_equal(run.group_rates != NULL, own);
            if (k == 0) { /* a plain loop over tensors */
                pk_trainer trainer;
                pk_real state_of[6][3 * 12] = {{0}}, update[12], now[34], next[34], there[34];
                assert_int_equal(
                    pk_trainer_prepare(&context, &graph, &data, options.loss, &options.optimizer, 4, &trainer),
                    PK_OK);
                for (size_t s = 0; s < STEPS; s++) {
                    pk_batch batch;
                    pk_run_batch(&run, s, &batch);
                    assert_int_equal(pk_run_weights(&context, &run, s, now), PK_OK);
                    assert_int_equal(pk_run_weights(&context, &run, s + 1, there), PK_OK);
                    assert_int_equal(
                        pk_training_step(&context, &trainer, s, 0.05, 0, &batch, now, next, NULL, NULL), PK_OK);
                    for (size_t t = 0; t < 6; t++) {
                        pk_optimizer optimizer = options.optimizer;
                        const size_t count = offsets[t + 1] - offsets[t];
                        const int grouped = t && t != 4;
                        const double rate = !grouped ? 0.05 : own ? pk_schedule_rate(&rates[0], s) : 0.025;
                        if (grouped)
                            assert_int_equal(pk_optimizer_parse(&context, rules[c / 2].grouped, &optimizer),
                                             PK_OK);
                        pk_optimizer_update(&optimizer, s, rate, 1, count, now + offsets[t],
                                            trainer.gradient + offsets[t], state_of[t], update);
                        for (size_t i = 0; i < count; i++)
                            assert_true(
                                there[offsets[t] + i] ==
                                (t == 4 ? now[offsets[t] + i] : (pk_real)(now[offsets[t] + i] + update[i])));
                    }
                }
                pk_trainer_release(&context, &trainer);
            }
            if (pk_decompose(&context, &run, pk_matrix_view(inputs, 5, 3), &asked, &out[k]))
                fail_msg("%s: %s", rules[c / 2].rule, pk_message(&context));
            assert_true(out[k].worst_unattributed <= EITHER(1e-13, 1e-4));
            /* Entries, decay and bounds against the definition. */
            double there[6][10], entries[10 * EXAMPLES], largest = 0;
            const pk_reference reference = {there[0], there[1], entries, there[2], there[3], there[4], NULL};
            assert_int_equal(
                pk_decompose_reference(&context, &run, pk_matrix_view(inputs, 5, 3), 4, 14, &reference), PK_OK);
            for (size_t i = 0; i < 10 * EXAMPLES; i++)
                largest = fmax(largest, fabs(entries[i]));
            for (size_t i = 0; i < 10 * EXAMPLES; i++) {
                const double error = fabs(out[k].by_example[i] - entries[i]);
                assert_true(error <= EITHER(1e-10, 1e-3) * largest);
                if (!(error <= out[k].bounds[i] + EITHER(1e-12, 1e-3) * largest))
                    fail_msg("%s, %s: an entry is off by %.3g, and its bound is %.3g", rules[c / 2].rule,
                             rules[c / 2].keys, error, (double)out[k].bounds[i]);
            }
            for (size_t i = 0; i < 10; i++) {
                assert_true(fabs(out[k].decay[i] - there[2][i]) <= EITHER(1e-10, 1e-3) * largest);
                assert_true(fabs(there[3][i]) <= EITHER(1e-13, 1e-4));
            }
            for (size_t i = 0; i < 10; i++) {
                assert_true(fabs(out[k].closure[i]) <= EITHER(1e-12, 1e-4));
                assert_true(out[k].kept[0].data[3 * i] != 0);
                assert_true(out[k].kept[0].data[3 * i + 1] != 0);
                assert_memory_equal(&out[0].kept[0].data[3 * i], &out[k].kept[0].data[3 * i],
                                    3 * sizeof(double));
            }
            pk_run_release(&context, &run);
        }
        pk_decomposition_release(&context, &out[0]);
        pk_decomposition_release(&context, &out[1]);
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
    snprintf(remove, sizeof remove, "rm -rf '%s'", root);
    assert_int_equal(system(remove), 0);
}

/* The decomposition of a run and its definition; by_example counts. */
static double against_definition(pk_context *context, const pk_run *run, pk_real *inputs,
                                 double entries[10 * EXAMPLES])
{
    double there[5][10], expected[10 * EXAMPLES], largest = 0;
    const pk_reference reference = {there[0], there[1], expected, there[2], there[3], there[4], NULL};
    pk_decompose_options asked = {0};
    pk_decomposition out;
    asked.keep[0] = PK_BY_EXAMPLE;
    asked.unattributed = (double)INFINITY;
    assert_ok(context, pk_decompose(context, run, pk_matrix_view(inputs, 5, 3), &asked, &out));
    assert_ok(context, pk_decompose_reference(context, run, pk_matrix_view(inputs, 5, 3), 4, 14, &reference));
    memcpy(entries, out.by_example, sizeof expected);
    for (size_t i = 0; i < 10 * EXAMPLES; i++)
        largest = fmax(largest, fabs(expected[i]));
    for (size_t i = 0; i < 10 * EXAMPLES; i++)
        assert_close(entries[i], expected[i], EITHER(1e-10, 1e-3) * largest);
    double unattributed = 0;
    for (size_t i = 0; i < 10; i++) {
        assert_close(out.decay[i], there[2][i], EITHER(1e-10, 1e-3) * largest);
        assert_close(out.unattributed[i], there[3][i], EITHER(1e-10, 1e-3) * largest);
        assert_true(fabs(out.closure[i]) <= EITHER(1e-12, 1e-4));
        unattributed = fmax(unattributed, fabs(out.unattributed[i]) / largest);
    }
    pk_decomposition_release(context, &out);
    return unattributed;
}

/* Recorded second moments are those of each tensor's own optimizer, also in a resumed run, and give the entries that recomputed
 * ones give; others in their place are what the decomposition divides by. */
static void recorded_second_moments(void **state)
{
    static const char *const adams[] = {"adam weight_decay=0.1", "adamw beta2=0.99 weight_decay=0.2"};
    static const char *const own[] = {"1-3,5 weight_decay=0 beta2=0.9 epsilon=1e-3 rate=0.5", "4 frozen"};
    (void)state;
    for (size_t c = 0; c < 2; c++) {
        pk_context context = {0};
        pk_graph graph = {0};
        pk_run run;
        pk_real inputs[EXAMPLES * 3], w[34], start[34], now[34], next[34], moments[34],
            state_of[6][2 * 12] = {{0}};
        double entries[2][10 * EXAMPLES], *all = FIXTURE_NEW(double, STEPS * 34);
        int64_t targets[EXAMPLES];
        char path[300];
        const pk_dataset data = some_data(inputs, targets);
        pk_train_options options = {0};
        pk_trainer trainer;
        assert_ok(&context, pk_network_parse(&context, NETWORK, &graph));
        assert_ok(&context, pk_optimizer_parse(&context, adams[c], &options.optimizer));
        options.loss = PK_SOFTMAX_CROSS_ENTROPY;
        options.schedule.rate = 0.05;
        options.batch_size = 4;
        options.groups = own;
        options.group_count = 2;
        options.record = fixture_run_path;
        options.record_second_moments = 1;
        for (size_t p = 0; p < 34; p++)
            start[p] = (pk_real)(0.5 * cos(1.3 * (double)p));
        for (int part = 0; part < 2; part++) {
            options.replace = !part;
            options.resume = part;
            options.steps = part ? STEPS : STEPS - 4;
            memcpy(w, start, sizeof w);
            assert_ok(&context, pk_train(&context, &graph, &data, &options, w, NULL));
        }
        assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
        assert_ok(&context,
                  pk_trainer_prepare(&context, &graph, &data, options.loss, &options.optimizer, 4, &trainer));
        for (size_t s = 0; s < STEPS; s++) {
            pk_batch batch;
            pk_run_batch(&run, s, &batch);
            assert_ok(&context, pk_run_weights(&context, &run, s, now));
            assert_ok(&context, pk_run_second_moments(&context, &run, s, moments));
            assert_ok(&context,
                      pk_training_step(&context, &trainer, s, 0.05, 0, &batch, now, next, NULL, NULL));
            for (size_t t = 0; t < 6; t++) {
                pk_optimizer optimizer = options.optimizer;
                const size_t count = offsets[t + 1] - offsets[t];
                if (t && t != 4)
                    optimizer.weight_decay = 0, optimizer.beta2 = 0.9, optimizer.epsilon = 1e-3;
                if (t != 4)
                    pk_optimizer_update(&optimizer, s, 0.05, 1, count, now + offsets[t],
                                        trainer.gradient + offsets[t], state_of[t], next);
                for (size_t i = 0; i < count; i++) {
                    assert_true(moments[offsets[t] + i] == state_of[t][count + i]);
                    /* Of a frozen tensor they are not read. */
                    all[s * 34 + offsets[t] + i] =
                        t == 4 ? 5 : moments[offsets[t] + i] * (1 + 0.5 * (double)(i % 3));
                }
            }
        }
        pk_trainer_release(&context, &trainer);
        assert_true(against_definition(&context, &run, inputs, entries[0]) <= EITHER(1e-12, 1e-4));
        pk_run_release(&context, &run);
        snprintf(path, sizeof path, "%s/second_moments.npy", fixture_run_path);
        assert_int_equal(remove(path), 0);
        assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
        assert_true(against_definition(&context, &run, inputs, entries[1]) <= EITHER(1e-12, 1e-4));
        for (size_t i = 0; i < 10 * EXAMPLES; i++)
            assert_close(entries[0][i], entries[1][i], EITHER(1e-11, 1e-3));
        pk_run_release(&context, &run);
        const size_t shape[2] = {STEPS, 34};
        assert_ok(&context, pk_array_write(&context, path, PK_FLOAT64, 2, shape, all));
        assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
        assert_true(against_definition(&context, &run, inputs, entries[1]) > 1e-3);
        pk_run_release(&context, &run);
        pk_graph_release(&context, &graph);
        free(all);
        fixture_clear(fixture_run_path);
        assert_int_equal(context.memory_used, 0);
    }
}

/* A recorded run whose files are then replaced one by one. */
typedef struct broken_case {
    const char *network, *rest; /* of run.txt; NULL: as recorded */
    const char *file;           /* that is written over; NULL: none */
    pk_type type;
    size_t rows, columns; /* columns 0: of rank 1; both 0: the file is removed */
    double fill, one;     /* everywhere, and at `row`, `column` */
    size_t row, column;
    pk_status status;
    const char *message;
} broken_case;

enum { BROKEN_STEPS = 6 };
#define GROUPS "group 1-3,5 weight_decay=0\ngroup 4 frozen\ngroup 0\n"

static void broken_runs(void **state)
{
    static const char *const own[] = {"1-3,5 weight_decay=0", "4 frozen", "0"};
    static const broken_case cases[] = {
        {NULL, NULL, NULL, PK_FLOAT64, 0, 0, 0, 0, 0, 0, PK_OK, ""},
        /* group_rates.npy */
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 6, 2, 0.1, 0.1, 0, 0, PK_SHAPE,
         "group_rates.npy has 2 columns, run.txt has 3 group lines"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 6, 4, 0.1, 0.1, 0, 0, PK_SHAPE,
         "group_rates.npy has 4 columns, run.txt has 3 group lines"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 18, 0, 0.1, 0.1, 0, 0, PK_SHAPE,
         "group_rates.npy has 1 dimensions, it has to have 2"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT32, 6, 3, 0.1, 0.1, 0, 0, PK_FORMAT,
         "group_rates.npy holds float32, it has to hold float64"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 6, 3, 0.1, (double)NAN, 2, 0, PK_NOT_FINITE,
         "group_rates.npy holds nan at row 2, column 0; a rate is finite and >= 0"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 6, 3, 0.1, (double)INFINITY, 5, 2, PK_NOT_FINITE,
         "group_rates.npy holds inf at row 5, column 2; a rate is finite and >= 0"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 6, 3, 0.1, -0.5, 1, 2, PK_ARGUMENT,
         "group_rates.npy holds -0.5 at row 1, column 2; a rate is finite and >= 0"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 6, 3, 0.1, -0.5, 1, 1, PK_OK, ""},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 6, 3, 0.1, (double)NAN, 1, 1, PK_OK, ""},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 3, 3, 0.1, 0.1, 0, 0, PK_SHAPE,
         "group_rates.npy holds 3 rows"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 0, 3, 0.1, 0.1, 0, 0, PK_SHAPE, "group_rates.npy"},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 7, 3, 0.1, 0.1, 0, 0, PK_OK, ""},
        {NULL, NULL, "group_rates.npy", PK_FLOAT64, 9, 3, 0.1, 0.1, 0, 0, PK_SHAPE,
         "group_rates.npy holds 9 rows"},
        {NULL, GROUPS, "group_rates.npy", PK_FLOAT64, 0, 0, 0, 0, 0, 0, PK_FORMAT,
         "run.txt line 8: a group without a key, and there is no group_rates.npy"},
        {NULL, "", NULL, PK_FLOAT64, 0, 0, 0, 0, 0, 0, PK_FORMAT, "group_rates.npy: run.txt has no group line"},
        {NULL, "group 0\ngroup 1 rate=2\ngroup 2 frozen\n", NULL, PK_FLOAT64, 0, 0, 0, 0, 0, 0, PK_FORMAT,
         "run.txt line 7: rate= beside group_rates.npy"},
        /* second_moments.npy */
        {NULL, NULL, "second_moments.npy", PK_FLOAT64, 6, 33, 1, 1, 0, 0, PK_SHAPE,
         "second_moments.npy has rows of 33 numbers, the network has 34 parameters"},
        {NULL, NULL, "second_moments.npy", PK_FLOAT64, 6, 34, 1, -1e-9, 3, 2, PK_FORMAT,
         "second_moments.npy: parameter 2 at step 3 is -1e-09; it must be >= 0"},
        {NULL, NULL, "second_moments.npy", PK_FLOAT32, 6, 34, 1, (double)NAN, 2, 33, PK_NOT_FINITE,
         "second_moments.npy: parameter 33 at step 2 is nan"},
        {NULL, NULL, "second_moments.npy", PK_FLOAT64, 3, 34, 1, 1, 0, 0, PK_SHAPE,
         "second_moments.npy holds 3 rows"},
    /* group lines */
#define LINE(text, status, words)                   \
    {NULL,   "group 4 frozen\n" text "\ngroup 0\n", \
     NULL,   PK_FLOAT64,                            \
     0,      0,                                     \
     0,      0,                                     \
     0,      0,                                     \
     status, "run.txt line 7: " words}
        LINE("group 1,2,4", PK_FORMAT, "tensor 4 is in group 0 already; groups are numbered from 0"),
        LINE("group 5-6", PK_ARGUMENT, "tensor 6: the network has 6, numbered from 0"),
        LINE("group 99999999999 beta1=0.5", PK_FORMAT,
             "'99999999999' is not a list of tensors such as 1,3,5-7"),
        LINE("group 1,1", PK_FORMAT, "tensor 1 stands twice in this group"),
        LINE("group 1-3,2", PK_FORMAT, "tensor 2 stands twice in this group"),
        LINE("group 3-1", PK_FORMAT, "tensors 3-1: the last comes before the first"),
        LINE("group -1", PK_FORMAT, "'-1' is not a list of tensors such as 1,3,5-7"),
        LINE("group 1-", PK_FORMAT, "'1-' is not a list of tensors such as 1,3,5-7"),
        LINE("group 1.5", PK_FORMAT, "'1.5' is not a list of tensors such as 1,3,5-7"),
        LINE("group 1, 2", PK_FORMAT, "'1,' is not a list of tensors such as 1,3,5-7"),
        LINE("group 1 2", PK_FORMAT, "optimizer adam: '2' is not one of its keys"),
        LINE("group weight_decay=0", PK_FORMAT, "'weight_decay=0' is not a list of tensors such as 1,3,5-7"),
        LINE("group all", PK_FORMAT, "'all' is not a list of tensors such as 1,3,5-7"),
        LINE("group", PK_FORMAT, "'group' has no value"),
        LINE("groups 1", PK_FORMAT, "unknown key 'groups'"),
        LINE("group 1 frozen beta1=0.5", PK_FORMAT, "a frozen group has no other key"),
        LINE("group 1 beta1=0.5 frozen", PK_FORMAT, "a frozen group has no other key"),
        LINE("group 1 rate=2 frozen", PK_FORMAT, "a frozen group has no other key"),
        LINE("group 1 frozen frozen", PK_FORMAT, "'frozen' stands twice"),
        LINE("group 1 frozen=1", PK_FORMAT, "optimizer adam: 'frozen=1' is not one of its keys"),
        LINE("group 1 momentum=0.5", PK_FORMAT, "optimizer adam: 'momentum=0.5' is not one of its keys"),
        LINE("group 1 beta1=0.5 beta1=0.6", PK_FORMAT, "optimizer adam: 'beta1=0.6' gives beta1 a second time"),
        LINE("group 1 beta1=1", PK_ARGUMENT, "optimizer adam: beta1 is 1; it must be in [0, 1)"),
        LINE("group 1 beta2=-0.1", PK_ARGUMENT, "optimizer adam: beta2 is -0.1"),
        LINE("group 1 weight_decay=nan", PK_FORMAT,
             "optimizer adam: 'weight_decay=nan' is not weight_decay=number"),
        LINE("group 1 weight_decay=inf", PK_FORMAT,
             "optimizer adam: 'weight_decay=inf' is not weight_decay=number"),
        LINE("group 1 weight_decay=", PK_FORMAT, "optimizer adam: 'weight_decay=' is not weight_decay=number"),
        LINE("group 1 weight_decay", PK_FORMAT, "optimizer adam: 'weight_decay' is not weight_decay=number"),
        LINE("group 1 epsilon=1e", PK_FORMAT, "optimizer adam: 'epsilon=1e' is not epsilon=number"),
        LINE("group 1 rate=nan", PK_FORMAT, "'rate=nan' is not rate=number"),
        LINE("group 1 rate=-1", PK_ARGUMENT, "rate is -1; it must be finite and >= 0"),
        LINE("group 1 rate=", PK_FORMAT, "'rate=' is not rate=number"),
        LINE("group 1 rate=x", PK_FORMAT, "'rate=x' is not rate=number"),
        LINE("group 1 rate=1 rate=1", PK_FORMAT, "'rate=1' gives rate a second time"),
#undef LINE
    /* name= and tied= */
#define TIED(text, status, words) \
    {text, "", NULL, PK_FLOAT64, 0, 0, 0, 0, 0, 0, status, "run.txt line 3: network, " words}
        TIED("input 3; dense 4; tanh; dense 2 tied=h", PK_FORMAT,
             "layer 4: dense: tied=h: no layer before it says name=h"),
        TIED("input 3; dense 4 tied=h; tanh; dense 2 name=h", PK_FORMAT,
             "layer 2: dense: tied=h: no layer before it says name=h"),
        TIED("input 3; dense 3 name=h tied=h; dense 2", PK_FORMAT,
             "layer 2: dense: tied=h: no layer before it says name=h"),
        TIED("input 3; dense 4 name=h; dense 4 name=h; dense 2", PK_FORMAT,
             "layer 3: dense: a layer before it has the name 'h' already"),
        TIED("input 3; dense 4 name=; dense 2", PK_FORMAT,
             "layer 2: dense: '' is not the name of a layer: up to 31 letters, digits and _"),
        TIED("input 3; dense 4 name=h; dense 4 tied=; dense 2", PK_FORMAT,
             "layer 3: dense: '' is not the name of a layer: up to 31 letters, digits and _"),
        TIED("input 3; dense 4 name=a-b; dense 2", PK_FORMAT,
             "layer 2: dense: 'a-b' is not the name of a layer: up to 31 letters, digits and _"),
        TIED("input 3; dense 4 name=abcdefghijklmnopqrstuvwxyzabcdef; dense 2", PK_FORMAT,
             "layer 2: dense: 'abc"),
        TIED("input 3; dense 4 name=h; tanh; dense 2 tied=h", PK_SHAPE,
             "layer 4: dense tied=h: its weight has the shape 2x4, that of the dense which it shares is 4x3"),
        TIED("input 3; dense 4 name=h; tanh; dense 4 tied=h.bias; dense 4 tied=h.weight; dense 2", PK_SHAPE,
             "layer 5: dense tied=h.weight: its weight has the shape 4x4, that of the dense which it shares is "
             "4x3"),
        TIED("input 3; dense 4 name=h; tanh; dense 5 tied=h.bias; dense 2", PK_SHAPE,
             "layer 4: dense tied=h.bias: its bias has the shape 5, that of the dense which it shares is 4"),
        TIED("input 3; dense 4 name=h; dense 2 tied=h.weight transposed", PK_SHAPE,
             "layer 3: dense tied=h.weight: its weight has the shape 2x4, that of the dense which it shares is "
             "4x3, and transposed they must agree"),
        TIED("input 3; dense 4 name=h; dense 3 tied=h transposed; dense 2", PK_SHAPE,
             "layer 3: dense tied=h: its bias has the shape 3, that of the dense which it shares is 4"),
        TIED("input 3; dense 4 name=h; dense 3 tied=h.bias transposed; dense 2", PK_SHAPE,
             "layer 3: dense tied=h.bias: a bias of shape 4 has no transpose: only matrices have"),
        TIED("input 3; dense 4 name=h; dense 2 transposed", PK_FORMAT,
             "layer 3: dense: 'transposed' belongs to tied="),
        TIED("input 3; dense 4 name=h nobias; dense 4 tied=h.bias; dense 2", PK_ARGUMENT,
             "layer 3: dense tied=h.bias: dense has no bias to share"),
        TIED("input 3; dense 4 name=h; dense 4 nobias tied=h.bias; dense 2", PK_ARGUMENT,
             "layer 3: dense tied=h.bias: dense has no bias to share"),
        TIED("input 3; dense 4 name=h; dense 4 tied=h.gain; dense 2", PK_FORMAT,
             "layer 3: dense: tied=h.gain: behind the name, '.weight' and '.bias' are possible"),
        TIED("input 3; dense 4 name=h; dense 4 tied=h tied=h; dense 2", PK_FORMAT,
             "layer 3: dense: 'tied=h' comes twice"),
        TIED("input 3; tanh name=h; dense 2", PK_FORMAT,
             "layer 2: tanh: it has no weights that could be shared, so 'name=' says nothing"),
        TIED("input 3; dense 4 name=h; tanh tied=h; dense 2", PK_FORMAT,
             "layer 3: tanh: it has no weights that could be shared, so 'tied=' says nothing"),
        TIED(
            "input 3; dense 3 name=h; layer_norm tied=h; dense 2", PK_SHAPE,
            "layer 3: layer_norm tied=h: its weight has the shape 3, that of the dense which it shares is 3x3"),
        TIED("input 3 name=h; dense 3 tied=h; dense 2", PK_FORMAT,
             "layer 1: input has one shape, such as 64 or 1x28x28, and 'name=h' stands behind it"),
#undef TIED
        /* tied tensors are numbered once */
        {"input 3; dense 3 name=h; tanh; dense 3 tied=h; dense 2", "group 4 frozen\n", NULL, PK_FLOAT64, 0, 0,
         0, 0, 0, 0, PK_ARGUMENT, "run.txt line 6: tensor 4: the network has 4, numbered from 0"},
        {"input 3; dense 3 name=h; tanh; dense 3 tied=h.weight; dense 2",
         "group 2-4 frozen\ngroup 0,2 beta1=0.5\n", NULL, PK_FLOAT64, 0, 0, 0, 0, 0, 0, PK_FORMAT,
         "run.txt line 7: tensor 2 is in group 0 already; groups are numbered from 0"},
    };
    (void)state;
    pk_context context = {0};
    pk_graph graph = {0};
    pk_real inputs[EXAMPLES * 3], w[34];
    int64_t targets[EXAMPLES];
    const pk_dataset data = some_data(inputs, targets);
    const pk_schedule rates[3] = {{.rate = 0.02}, {0}, {.rate = 0.01}};
    pk_train_options options = {0};
    options.optimizer = pk_optimizer_default(PK_ADAM);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 0.05;
    options.steps = BROKEN_STEPS;
    options.groups = own;
    options.group_count = 3;
    options.group_schedules = rates;
    options.record = fixture_run_path;
    options.record_second_moments = 1;
    assert_ok(&context, pk_network_parse(&context, NETWORK, &graph));
    const size_t memory = context.memory_used;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const broken_case *b = &cases[c];
        char path[300], text[600];
        pk_run run;
        for (size_t p = 0; p < 34; p++)
            w[p] = (pk_real)(0.5 * cos(1.3 * (double)p));
        options.replace = c > 0;
        assert_ok(&context, pk_train(&context, &graph, &data, &options, w, NULL));
        if (b->network || b->rest) {
            snprintf(path, sizeof path, "%s/run.txt", fixture_run_path);
            snprintf(
                text, sizeof text,
                "pathkernel-run 1\n# a comment\nnetwork %s\nloss softmax_cross_entropy\noptimizer adam\n%s",
                b->network ? b->network : NETWORK, b->rest ? b->rest : GROUPS);
            FILE *file = fopen(path, "wb");
            assert_non_null(file);
            assert_true(fputs(text, file) >= 0);
            assert_int_equal(fclose(file), 0);
        }
        if (b->file) {
            const size_t shape[2] = {b->rows, b->columns}, numbers = b->rows * (b->columns ? b->columns : 1);
            double *doubles = FIXTURE_NEW(double, numbers);
            float *floats = FIXTURE_NEW(float, numbers);
            for (size_t i = 0; i < numbers; i++)
                doubles[i] = b->fill;
            if (numbers)
                doubles[b->row * b->columns + b->column] = b->one;
            for (size_t i = 0; i < numbers; i++)
                floats[i] = (float)doubles[i];
            snprintf(path, sizeof path, "%s/%s", fixture_run_path, b->file);
            assert_int_equal(remove(path), 0);
            if (b->rows + b->columns)
                assert_ok(&context, pk_array_write(&context, path, b->type, b->columns ? 2 : 1, shape,
                                                   b->type == PK_FLOAT32 ? (void *)floats : doubles));
            free(doubles), free(floats);
        }
        pk_status status = pk_run_open(&context, fixture_run_path, &run);
        if (!status) { /* what is found where a row is read */
            double there[5][2], entries[2 * EXAMPLES];
            const pk_reference reference = {there[0], there[1], entries, there[2], there[3], there[4], NULL};
            pk_decompose_options asked = {0};
            pk_decomposition out;
            asked.unattributed = (double)INFINITY;
            status = pk_decompose(&context, &run, pk_matrix_view(inputs, 1, 3), &asked, &out);
            if (!status)
                pk_decomposition_release(&context, &out);
            assert_int_equal(
                status, pk_decompose_reference(&context, &run, pk_matrix_view(inputs, 1, 3), 1, 2, &reference));
            pk_run_release(&context, &run);
        }
        if (status != b->status || (status && !strstr(pk_message(&context), b->message)))
            fail_msg("case %zu: %s: %s", c, pk_status_text(status), pk_message(&context));
        assert_int_equal(context.memory_used, memory);
    }
    pk_graph_release(&context, &graph);
    fixture_clear(fixture_run_path);
    assert_int_equal(context.memory_used, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_are_checked),
        cmocka_unit_test(runs_with_groups),
        cmocka_unit_test(recorded_second_moments),
        cmocka_unit_test(broken_runs),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
