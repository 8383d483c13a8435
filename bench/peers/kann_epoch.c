/* bench/peers/kann_epoch.c: an epoch of training by KANN (https://github.com/attractivechaos/kann, MIT), for run_kann.py,
 * which compiles it with a checkout of KANN.
 *
 *   kann_epoch DIR SECONDS THREADS
 *
 * DIR holds raw arrays in native order: shape.i32 (layers, widths ..., 1 for tanh or 0 for ReLU, examples, steps),
 * weights.f32 (PyTorch's order), inputs.f32, targets.i32, offsets.i32, items.i32 and rate.f32. Trains the epoch once and
 * writes the weights to trained.f32; then again and again for SECONDS, and prints the least time of an epoch. KANN has
 * RMSprop only; plain SGD is this file's loop, as in KANN's own examples with kann_cost.
 */
#include "kann.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* All of a file; exits where that fails. Items are 4 bytes. */
static void *load(const char *folder, const char *name)
{
    char path[600];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    void *data = NULL;
    long bytes = 0;
    if (file && fseek(file, 0, SEEK_END) == 0 && (bytes = ftell(file)) >= 0 && fseek(file, 0, SEEK_SET) == 0)
        data = malloc((size_t)bytes + 1);
    if (!data || fread(data, 1, (size_t)bytes, file) != (size_t)bytes) {
        fprintf(stderr, "kann_epoch: %s cannot be read\n", path);
        exit(2);
    }
    fclose(file);
    return data;
}

/* Between KANN's variables and PyTorch's vector: each layer's weight (out, in), then its bias. */
static void copy_weights(const kann_t *network, float *vector, int to_network)
{
    for (int dims = 0, i = 0; i < network->n; i++) {
        const kad_node_t *weight = network->v[i];
        if (!kad_is_var(weight) || weight->n_d != 2)
            continue;
        for (int part = 0; part < 2; part++) {
            const kad_node_t *node = weight;
            for (int j = 0, seen = 0; part && j < network->n; j++)
                if (kad_is_var(network->v[j]) && network->v[j]->n_d == 1 && seen++ == dims)
                    node = network->v[j];
            const size_t count = (size_t)kad_len(node);
            memcpy(to_network ? node->x : vector, to_network ? vector : node->x, count * sizeof *vector);
            vector += count;
        }
        dims++;
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    const char *folder = argv[1];
    const int32_t *shape = (int32_t *)load(folder, "shape.i32"), layers = shape[0], *widths = shape + 1;
    const int32_t smooth = shape[layers + 2], steps = shape[layers + 4];
    const int32_t *targets = (int32_t *)load(folder, "targets.i32"),
                  *items = (int32_t *)load(folder, "items.i32"),
                  *offsets = (int32_t *)load(folder, "offsets.i32");
    const float *inputs = (float *)load(folder, "inputs.f32"), rate = *(float *)load(folder, "rate.f32");
    float *weights = (float *)load(folder, "weights.f32");
    const size_t in = (size_t)widths[0], out = (size_t)widths[layers];

    kad_node_t *node = kann_layer_input(widths[0]);
    for (int l = 1; l < layers; l++) {
        node = kann_layer_dense(node, widths[l]);
        node = smooth ? kad_tanh(node) : kad_relu(node);
    }
    kann_t *network = kann_new(kann_layer_cost(node, widths[layers], KANN_C_CEM), 0);
    const int count = kann_size_var(network);
    int batch = 0;
    for (int s = 0; s < steps; s++)
        batch = offsets[s + 1] - offsets[s] > batch ? offsets[s + 1] - offsets[s] : batch;
    float *x = (float *)malloc((size_t)batch * in * sizeof *x),
          *y = (float *)malloc((size_t)batch * out * sizeof *y);
    if (!x || !y)
        return 2;
    copy_weights(network, weights, 1);
    if (atoi(argv[3]) > 1)
        kann_mt(network, atoi(argv[3]), batch);
    kann_feed_bind(network, KANN_F_IN, 0, &x);
    kann_feed_bind(network, KANN_F_TRUTH, 0, &y);

    double least = 1e30;
    const double end = seconds() + atof(argv[2]);
    for (int epoch = 0; epoch < 3 || seconds() < end; epoch++) {
        const double start = seconds();
        kann_switch(network, 1);
        for (int s = 0; s < steps; s++) {
            const int rows = offsets[s + 1] - offsets[s];
            memset(y, 0, (size_t)rows * out * sizeof *y);
            for (int r = 0; r < rows; r++) {
                const size_t item = (size_t)items[offsets[s] + r];
                memcpy(x + (size_t)r * in, inputs + item * in, in * sizeof *x);
                y[(size_t)r * out + (size_t)targets[item]] = 1;
            }
            kann_set_batch_size(network, rows);
            kann_cost(network, 0, 1);
            for (int i = 0; i < count; i++)
                network->x[i] -= rate * network->g[i];
        }
        const double passed = seconds() - start;
        least = passed < least ? passed : least;
        if (epoch == 0) {
            char path[600];
            copy_weights(network, weights, 0);
            snprintf(path, sizeof path, "%s/trained.f32", folder);
            FILE *file = fopen(path, "wb");
            if (!file || fwrite(weights, sizeof *weights, (size_t)count, file) != (size_t)count || fclose(file))
                return 2;
        }
    }
    printf("%.9g\n", least);
    kann_delete(network);
    return 0;
}
