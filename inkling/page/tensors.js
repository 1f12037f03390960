// Vectors and matrices: what the model takes from PyTorch in train.py. A vector is a Float32Array.

// A matrix (rows, columns) as the page holds it: whole numbers, and a scale for each row. With 32 bits
// the numbers are the weights themselves, and there are no scales.
class Matrix {
  constructor(rows, columns, values, scales) {
    Object.assign(this, {rows, columns, values, scales});
  }

  // The product with x (columns): (rows). Four rows at a time, so that x is read once for them.
  times(x) {
    const {rows, columns, values} = this;
    const y = new Float32Array(rows);
    let row = 0;
    for (; row + 3 < rows; row += 4) {
      const first = row * columns;
      const second = first + columns;
      const third = second + columns;
      const fourth = third + columns;
      let a = 0;
      let b = 0;
      let c = 0;
      let d = 0;
      for (let i = 0; i < columns; i++) {
        a += values[first + i] * x[i];
        b += values[second + i] * x[i];
        c += values[third + i] * x[i];
        d += values[fourth + i] * x[i];
      }
      y[row] = a;
      y[row + 1] = b;
      y[row + 2] = c;
      y[row + 3] = d;
    }
    for (; row < rows; row++) {
      for (let i = 0; i < columns; i++) y[row] += values[row * columns + i] * x[i];
    }
    return this.scales ? y.map((sum, i) => sum * this.scales[i]) : y;
  }

  // Add a row to x (columns).
  addRow(row, x) {
    const start = row * this.columns;
    const scale = this.scales ? this.scales[row] : 1;
    for (let i = 0; i < this.columns; i++) x[i] += scale * this.values[start + i];
  }
}

class Linear {
  constructor(weights, name) {
    this.weight = weights[`${name}.weight`];
    this.bias = weights[`${name}.bias`];
  }

  forward(x) {
    const y = this.weight.times(x);
    if (this.bias) addTo(y, this.bias);
    return y;
  }
}

function addTo(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

// a * x + b * y, with (a, b) = mix.
function blend(mix, x, y) {
  return x.map((value, i) => mix[0] * value + mix[1] * y[i]);
}

// x in place, with a root mean square of 1, times gain.
function rmsNorm(x, eps, gain) {
  let squares = 0;
  for (let i = 0; i < x.length; i++) squares += x[i] * x[i];
  const factor = 1 / Math.sqrt(squares / x.length + eps);
  for (let i = 0; i < x.length; i++) x[i] *= gain ? factor * gain[i] : factor;
}

// z in place.
function softmax(z) {
  const most = z.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (let i = 0; i < z.length; i++) sum += z[i] = Math.exp(z[i] - most);
  for (let i = 0; i < z.length; i++) z[i] /= sum;
}

// The error function, which JavaScript lacks: formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

const ACTIVATIONS = {
  relu: (x) => x > 0 ? x : 0,
  relu2: (x) => x > 0 ? x * x : 0,
  gelu: (x) => x / 2 * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x))),
  swiglu: (x) => x / (1 + Math.exp(-x)),
};

// As Python rounds.
function roundHalfToEven(number) {
  const down = Math.floor(number);
  const isHalf = number - down === 0.5;
  return isHalf ? down + down % 2 : Math.round(number);
}

// array, or a copy of it with room for `length` numbers and more.
function withRoom(array, length) {
  if (length <= array.length) return array;
  const longer = new Float32Array(2 * array.length);
  longer.set(array);
  return longer;
}
