"""The program's machines and measures against scikit-learn, libsvm and SciPy, on random problems: duplicated rows, separable and
not, few rows, C from 1e-6 to 1e6.

    PATHKERNEL=build/pathkernel python3 tests/python/test_machine.py

Needs numpy, scipy and scikit-learn (Debian: python3-sklearn).
"""
import os
import shutil
import subprocess
import tempfile
import unittest
import warnings

import numpy as np
from scipy.optimize import minimize
from scipy.stats import kendalltau, pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, SVR

PROGRAM = os.environ.get("PATHKERNEL", "build/pathkernel")


def problem(rng, n, width, kind):
    """A Gram matrix, one of test rows, and a score of each row."""
    x = rng.standard_normal((n, width))
    if kind == "duplicates":
        x[n // 2 :] = x[: n - n // 2]
    t = rng.standard_normal((7, width))
    square = ((x[:, None] - x[None]) ** 2).sum(-1), ((t[:, None] - x[None]) ** 2).sum(-1)
    gram, test = np.exp(-square[0] / 2), np.exp(-square[1] / 2)
    score = x[:, 0] + (0 if kind == "separable" else rng.standard_normal(n))
    return gram, test, score


class Machines(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pathkernel-machine-")
        self.rng = np.random.default_rng(3)

    def tearDown(self):
        shutil.rmtree(self.folder)

    def run_program(self, *words):
        done = subprocess.run([PROGRAM, *words], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def machine(self, gram, targets, loss, regularization, test, *words):
        for name, array in (("K", gram), ("Y", targets), ("KT", test)):
            np.save(f"{self.folder}/{name}.npy", array)
        f = self.folder
        self.run_program(
            "machine", "--gram", f"{f}/K.npy", "--targets", f"{f}/Y.npy", "--loss", loss, "--regularization",
            repr(float(regularization)), "--test", f"{f}/KT.npy", "--attribute", "--out", f"{f}/out", "--tolerance", "1e-6", *words,
        )  # fmt: skip
        out = {name[:-4]: np.load(f"{f}/out/{name}") for name in os.listdir(f"{f}/out") if name.endswith(".npy")}
        shutil.rmtree(f"{f}/out")
        total = out["attribution"].sum(-1) + out["intercept"]
        np.testing.assert_allclose(total, out["prediction"], rtol=0, atol=1e-12 * (1 + np.abs(out["attribution"]).sum(-1).max()))
        return out

    def test_support_vectors(self):
        fits = 0
        for kind in ("plain", "duplicates", "separable"):
            for c in (1e-6, 0.1, 1, 100, 1e6):
                gram, test, score = problem(self.rng, 40, 3, kind)
                y = np.where(score > 0, 1, -1)
                ours = self.machine(gram, y.astype(float), "hinge", 1 / c, test, "--intercept")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that libsvm stops before its end
                    theirs = SVC(kernel="precomputed", C=c, tol=1e-9, max_iter=50000).fit(gram, y)
                alpha = np.zeros(40)
                alpha[theirs.support_] = theirs.dual_coef_[0]

                def objective(a, b):
                    return a @ gram @ a / 2 + c * np.maximum(0, 1 - y * (gram @ a + b)).sum()

                found = objective(ours["coefficients"][:, 0], ours["intercept"][0])
                self.assertLessEqual(found, objective(alpha, theirs.intercept_[0]) * (1 + 1e-7))
                if c <= 1:
                    np.testing.assert_allclose(ours["prediction"][:, 0], theirs.decision_function(test), rtol=0, atol=1e-5)
                ours = self.machine(gram, score, "epsilon_insensitive", 1 / c, test, "--intercept", "--epsilon", "0.1")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    theirs = SVR(kernel="precomputed", C=c, tol=1e-9, epsilon=0.1, max_iter=50000).fit(gram, score)
                alpha = np.zeros(40)
                alpha[theirs.support_] = theirs.dual_coef_[0]

                def objective_r(a, b):
                    return a @ gram @ a / 2 + c * np.maximum(0, np.abs(gram @ a + b - score) - 0.1).sum()

                found = objective_r(ours["coefficients"][:, 0], ours["intercept"][0])
                self.assertLessEqual(found, objective_r(alpha, theirs.intercept_[0]) * (1 + 1e-7))
                fits += 2
        print(f"{fits} support vector machines agree with libsvm")

    def test_several_classes(self):
        gram, test, score = problem(self.rng, 60, 3, "plain")
        y = np.digitize(score, [-0.7, 0.7])
        ours = self.machine(gram, y, "hinge", 0.5, test, "--intercept")
        self.assertEqual(ours["coefficients"].shape, (60, 3))
        for c in range(3):
            theirs = SVC(kernel="precomputed", C=2, tol=1e-10).fit(gram, y == c)
            np.testing.assert_allclose(ours["prediction"][:, c], theirs.decision_function(test), rtol=0, atol=1e-6)

    def test_logistic_and_softmax(self):
        """Coefficients penalized: scikit-learn's regression on the rows of the Gram matrix."""
        for kind in ("plain", "duplicates", "separable"):
            for regularization in (1e-2, 1, 30):
                for intercept in (False, True):
                    gram, test, score = problem(self.rng, 45, 3, kind)
                    words = ["--penalty", "coefficients"] + ["--intercept"] * intercept
                    for loss, y in (("logistic", (score > 0).astype(int)), ("softmax", np.digitize(score, [-0.7, 0.7]))):
                        ours = self.machine(gram, y, loss, regularization, test, *words)
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            theirs = LogisticRegression(
                                C=1 / regularization, fit_intercept=intercept, solver="newton-cg", tol=1e-12, max_iter=5000
                            ).fit(gram, y)
                        wanted = test @ theirs.coef_.T + theirs.intercept_
                        np.testing.assert_allclose(ours["prediction"], wanted, rtol=0, atol=2e-5 * (1 + np.abs(wanted).max()))

    def test_rkhs_softmax(self):
        gram, test, score = problem(self.rng, 20, 3, "plain")
        y, n = np.digitize(score, [-0.7, 0.7]), 20
        ours = self.machine(gram, y, "softmax", 0.3, test)

        def objective(flat):
            f = gram @ flat.reshape(n, 3)
            p = np.exp(f - f.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            value = -np.log(p[np.arange(n), y]).sum() + 0.15 * (flat.reshape(n, 3) * f).sum()
            return value, (gram @ (p - np.eye(3)[y] + 0.3 * flat.reshape(n, 3))).ravel()

        theirs = minimize(objective, np.zeros(3 * n), jac=True, method="L-BFGS-B", options={"maxiter": 20000, "ftol": 1e-16, "gtol": 1e-10})
        np.testing.assert_allclose(ours["fitted"], gram @ theirs.x.reshape(n, 3), rtol=0, atol=1e-5)

    def test_ridge(self):
        for kind in ("plain", "duplicates"):
            for intercept in (False, True):
                gram, test, score = problem(self.rng, 50, 3, kind)
                y = np.stack([score, score**2], 1)
                np.save(f"{self.folder}/D.npy", np.ones(len(test)))
                ours = self.machine(gram, y, "squared", 0.2, test, "--test-diagonal", f"{self.folder}/D.npy", *["--intercept"] * intercept)
                a = gram + 0.2 * np.eye(50)
                one = np.ones(50)
                b = one @ np.linalg.solve(a, y) / (one @ np.linalg.solve(a, one)) * intercept
                alpha = np.linalg.solve(a, y - b)
                np.testing.assert_allclose(ours["coefficients"], alpha, rtol=0, atol=1e-10)
                np.testing.assert_allclose(ours["prediction"], test @ alpha + b, rtol=0, atol=1e-11)
                variance = 1 - np.einsum("mi,im->m", test, np.linalg.solve(a, test.T))
                if intercept:
                    variance += (1 - test @ np.linalg.solve(a, one)) ** 2 / (one @ np.linalg.solve(a, one))
                np.testing.assert_allclose(ours["variance"], variance, rtol=0, atol=1e-11)

    def test_refused(self):
        gram, test, score = problem(self.rng, 10, 3, "plain")
        f = self.folder
        np.save(f"{f}/K.npy", gram)
        np.save(f"{f}/Y.npy", score)
        np.save(f"{f}/T.npy", np.ascontiguousarray(test.T))
        np.save(f"{f}/N.npy", -gram)
        common = ["--targets", f"{f}/Y.npy", "--loss", "squared", "--regularization", "1", "--out", f"{f}/out"]
        for words, said in (
            (["--gram", f"{f}/K.npy", "--test", f"{f}/T.npy"], "other way round"),
            (["--gram", f"{f}/T.npy"], "square matrix"),
            (["--gram", f"{f}/N.npy"], "not positive semidefinite"),
            (["--gram", f"{f}/K.npy", "--attribute"], "--test"),
            (["--gram", f"{f}/K.npy", "--penalty", "coefficients"], "logistic and softmax only"),
            (["--gram", f"{f}/K.npy", "extra"], "options only"),
        ):
            done = subprocess.run([PROGRAM, "machine", *words, *common], capture_output=True, text=True)
            self.assertEqual(done.returncode, 2, words)
            self.assertIn(said, done.stderr)
            self.assertEqual(done.stderr.count("\n"), 1)
            self.assertFalse(os.path.exists(f"{f}/out"))


class Measures(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pathkernel-measure-")
        self.rng = np.random.default_rng(4)

    def tearDown(self):
        shutil.rmtree(self.folder)

    def measure(self, **arrays):
        words = []
        for name, array in arrays.items():
            np.save(f"{self.folder}/{name}.npy", array)
            words += [f"--{name}", f"{self.folder}/{name}.npy"]
        done = subprocess.run([PROGRAM, "measure", *words], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}

    def close(self, found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)

    def test_lists(self):
        for n in (2, 3, 10, 500):
            for levels in (2, 5, 10**6):
                a, b = self.rng.integers(0, levels, n).astype(float), self.rng.integers(0, levels, n).astype(float)
                found = self.measure(first=a, second=b)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.close(found["kendall"], kendalltau(a, b)[0])
                    self.close(found["pearson"], pearsonr(a, b)[0])
                    self.close(found["spearman"], spearmanr(a, b)[0])

    def test_grams(self):
        for n in (4, 5, 40):
            x, z = self.rng.standard_normal((n, 6)), self.rng.standard_normal((n, 3))
            k, l, y = x @ x.T, z @ z.T + x @ x.T / 3, self.rng.standard_normal(n)
            one = self.measure(first=k, targets=y)
            values = np.linalg.eigvalsh(k)
            p = values[values > 1e-13 * values[-1]] / values.sum()
            np.testing.assert_allclose(one["effective_rank"], np.exp(-(p * np.log(p)).sum()), rtol=1e-9)
            self.close(one["participation_ratio"], values.sum() ** 2 / (values**2).sum())
            self.close(one["target_alignment"], y @ k @ y / np.linalg.norm(k) / (y @ y))
            two = self.measure(first=k, second=l)
            h = np.eye(n) - 1 / n
            inner = lambda a, b: np.trace(a @ h @ b @ h)
            self.close(two["cka"], inner(k, l) / np.sqrt(inner(k, k) * inner(l, l)))
            self.close(two["alignment"], (k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))
            unit = np.ones(n)

            def hsic(a, b):
                a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
                return np.trace(a @ b) + (unit @ a @ unit) * (unit @ b @ unit) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (unit @ a @ b @ unit)

            if n > 5:
                np.testing.assert_allclose(two["cka_unbiased"], hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)), rtol=1e-10)

    def test_predictions(self):
        for m, classes in ((30, 2), (200, 10)):
            s = 3 * self.rng.standard_normal((m, classes))
            t = s + self.rng.standard_normal((m, classes))
            y = self.rng.integers(0, classes, m)
            found = self.measure(first=s, second=t, targets=y)
            softmax = lambda z: (np.exp(z - z.max(1, keepdims=True)) / np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))[np.arange(m), y]
            p, q = softmax(s), softmax(t)
            self.close(found["kendall"], kendalltau(p, q)[0])
            self.close(found["pearson"], pearsonr(p, q)[0])
            self.close(found["spearman"], spearmanr(p, q)[0])
            np.testing.assert_allclose(found["log_odds_r2"], pearsonr(np.log(p / (1 - p)), np.log(q / (1 - q)))[0] ** 2, rtol=1e-10)
            wrong, missed = s.argmax(1) != y, t.argmax(1) != y
            self.close(found["r_miss"], (wrong & missed).sum() / (wrong | missed).sum())
            self.close(found["tad"], missed.mean() - wrong.mean())


if __name__ == "__main__":
    unittest.main()
