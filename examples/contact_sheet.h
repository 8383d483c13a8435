/* What tutorials 02 and 05 share: a picture of decisions on digits, one row a test digit, with the training digits
 * that speak for and against the decision. Include it after tutorial.h. */
#ifndef CONTACT_SHEET_H
#define CONTACT_SHEET_H

enum { SHEET_ROWS = 8, SHOWN = 4, SHEET_CLASSES = 10 };
enum { BLUE = 0x0072B2, ORANGE = 0xC84B00, BLACK = 0x222222, GREY = 0x777777 }; /* told apart by everybody */
enum { PITCH_X = 11, PITCH_Y = 13, FOR_X = 14, AGAINST_X = FOR_X + SHOWN * PITCH_X + 3 };
enum { SHEET_WIDTH = AGAINST_X + SHOWN * PITCH_X, ACCOUNT_X = SHEET_WIDTH + 28 };
enum { SHEET_HEIGHT = SHEET_ROWS * PITCH_Y };

/* The first train digits are the training data. Test digit m is digit items[m], and was read as read_as[m]. parts: of
 * the test digits, by example, either every output or only the one decided for. */
typedef struct sheet_subject {
    const pk_dataset *digits;
    size_t train, test;
    const int64_t *items;
    const size_t *read_as;
    const pk_decomposition *parts;
    const char *folder, *subtitle;
} sheet_subject;

static inline int sheet_label(const sheet_subject *r, int64_t digit)
{
    return (int)((const int64_t *)r->digits->targets.data)[digit];
}

static inline int sheet_is_wrong(const sheet_subject *r, size_t m)
{
    return sheet_label(r, r->items[m]) != (int)r->read_as[m];
}

/* Half of the rows for decisions that are right, then wrong ones as far as there are any; of these the first
 * with a label (or a confusion) that is not there yet. Returns how many. */
static inline size_t sheet_choose_rows(const sheet_subject *r, size_t *rows)
{
    size_t count = 0;
    for (int pass = 0; pass < 2; pass++) { /* right, wrong */
        int seen[SHEET_CLASSES][SHEET_CLASSES] = {{0}};
        for (size_t m = 0; m < r->test && count < (pass ? SHEET_ROWS : SHEET_ROWS / 2); m++)
            if (sheet_is_wrong(r, m) == pass && !seen[sheet_label(r, r->items[m])][r->read_as[m]]++)
                rows[count++] = m;
    }
    return count;
}

/* A number with its sign, the minus as long as the plus. */
static inline const char *with_sign(double value, char text[32])
{
    const char *sign = fabs(value) < 0.005 ? "" : value < 0 ? "\xe2\x88\x92" : "+";
    snprintf(text, 32, "%s%.2f", sign, fabs(value));
    return text;
}

enum { SHEET_PIXELS, SHEET_FRAMES, SHEET_CENTER, SHEET_LEFT, SHEET_RIGHT, SHEET_FILES };

typedef struct sheet {
    double ink[SHEET_HEIGHT][SHEET_WIDTH];
    FILE *file[SHEET_FILES]; /* lines of x, y, colour and, the last three, text */
} sheet;

static inline void put(sheet *s, const sheet_subject *r, size_t item, int x, int y, int colour,
                       const char *caption)
{
    const double *pixels = (const double *)r->digits->inputs.data + item * 64;
    for (int i = 0; i < 64; i++)
        s->ink[y + i / 8][x + i % 8] = pixels[i];
    for (int i = 0; i < 5; i++) /* around the digit */
        fprintf(s->file[SHEET_FRAMES], "%g %g %d\n%s", x + (i == 1 || i == 2 ? 7.7 : -0.7),
                y + (i == 2 || i == 3 ? 7.7 : -0.7), colour, i == 4 ? "\n" : "");
    fprintf(s->file[SHEET_CENTER], "%g %g %d \"%s\"\n", x + 3.5, y + 8.9, colour, caption);
}

static inline void put_account(sheet *s, double y, int colour, const char *name, const char *value)
{
    fprintf(s->file[SHEET_LEFT], "%d %g %d \"%s\"\n", SHEET_WIDTH + 1, y, colour, name);
    fprintf(s->file[SHEET_RIGHT], "%d %g %d \"%s\"\n", ACCOUNT_X, y, colour, value);
}

static inline void put_row(sheet *s, const sheet_subject *r, size_t m, int y)
{
    const pk_decomposition *d = r->parts;
    const size_t cell = m * d->outputs + (d->outputs > 1 ? r->read_as[m] : 0);
    const double *values = d->by_example + cell * r->train;
    char text[64], number[32];
    snprintf(text, sizeof text, "a %d, read as %zu", sheet_label(r, r->items[m]), r->read_as[m]);
    put(s, r, (size_t)r->items[m], 0, y, BLACK, text);
    for (int sign = 1; sign >= -1; sign -= 2) {
        size_t items[SHOWN], count = pk_strongest(values, r->train, sign, SHOWN, items);
        for (size_t k = 0; k < count; k++) {
            snprintf(text, sizeof text, "%d:  %s", sheet_label(r, (int64_t)items[k]),
                     with_sign(values[items[k]], number));
            put(s, r, items[k], (sign > 0 ? FOR_X : AGAINST_X) + (int)k * PITCH_X, y, sign > 0 ? BLUE : ORANGE,
                text);
        }
    }
    double sum[2] = {0, 0};
    for (size_t i = 0; i < r->train; i++)
        sum[values[i] < 0] += values[i];
    put_account(s, y, BLACK, "before training", with_sign(d->initial[cell], number));
    put_account(s, y + 2.2, BLUE, "all that speak for", with_sign(sum[0], number));
    put_account(s, y + 4.4, ORANGE, "all that speak against", with_sign(sum[1], number));
    snprintf(text, sizeof text, "= output %zu", r->read_as[m]);
    put_account(s, y + 6.6, BLACK, text, with_sign(d->final[cell], number));
    snprintf(number, sizeof number, "%.0e", fabs(d->closure[cell]));
    put_account(s, y + 8.9, GREY, "but for (closure)", number);
}

/* Writes contact_*.dat into the folder and draws contact_sheet.png with the script beside source. */
static inline int draw_contact_sheet(const sheet_subject *r, const char *source)
{
    static const char *const names[SHEET_FILES] = {"contact_pixels.dat", "contact_frames.dat",
                                                   "contact_center.dat", "contact_left.dat",
                                                   "contact_right.dat"};
    static sheet s;
    size_t rows[SHEET_ROWS], count = sheet_choose_rows(r, rows);
    int failed = 0, right = 0;
    for (int i = 0; i < SHEET_FILES; i++)
        if (!(s.file[i] = tutorial_create(r->folder, names[i])))
            return 1;
    for (size_t i = 0; i < count; i++) {
        put_row(&s, r, rows[i], (int)i * PITCH_Y);
        right += !sheet_is_wrong(r, rows[i]);
    }
    for (size_t y = 0; y < SHEET_HEIGHT; y++)
        for (size_t x = 0; x < SHEET_WIDTH; x++)
            fprintf(s.file[SHEET_PIXELS], "%g%c", s.ink[y][x], x + 1 < SHEET_WIDTH ? ' ' : '\n');
    for (int i = 0; i < SHEET_FILES; i++)
        failed |= fclose(s.file[i]) != 0;
    if (failed)
        return perror(r->folder), 1;
    char settings[512];
    snprintf(settings, sizeof settings,
             "subtitle = '%s'; sheet_width = %d; sheet_height = %d; for_x = %d; against_x = %d; "
             "group_width = %d; "
             "account_x = %d; pitch_y = %d; right_rows = %d; wrong_rows = %d",
             r->subtitle, SHEET_WIDTH, SHEET_HEIGHT, FOR_X, AGAINST_X, SHOWN * PITCH_X - 3, ACCOUNT_X, PITCH_Y,
             right, (int)count - right);
    return tutorial_plot(source, "02_contact_sheet.gp", r->folder, settings);
}

#endif
