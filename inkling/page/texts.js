// What the page says, in English and in Chinese, and how it writes numbers and tokens.

const TEXTS = {
  en: {
    prompt: "Begin a text, and the model continues it",
    temperature: "Temperature", topK: "Top-k (0: all)", length: "Tokens", seed: "Seed", dice: "Another seed",
    write: "Write", stop: "Stop", continueText: "Continue", edit: "Edit",
    textHint: "The text appears here. With an empty box the model begins by itself.",
    textLabel: "The text, token by token: arrow keys choose one",
    colours: "Colours", expected: "expected", surprising: "surprising",
    tokenTitle: "What could stand here",
    tokenHint: "Choose a token of the text to see what the model thought likely in its place.",
    keys: "Click a token to continue from there with it. By keyboard: arrows in the text, then 1 to 9 and 0; Ctrl+Enter writes, Esc stops.",
    close: "Close",
    first: "The first token: nothing stands before it.",
    facts: (p, bits, rank, all) => `Probability ${p}: a surprise of ${bits} bits. Number ${rank} of ${all}.`,
    loading: "Loading …", speed: (count, speed) => `${count} tokens, ${speed} per second`,
    reading: "Reading …",
    unknown: (characters) => `The model has never seen: ${characters}`,
    error: (message) => `It failed: ${message}`,
    noWorker: "This browser cannot run the model: it allows no worker in a page from a file.",
    summary: (parameters) => `A language model of ${parameters} parameters that lives in this page. Nothing you type leaves it.`,
    card: "About this model",
    dataset: "Trained on", parameters: "Parameters", shape: "Shape", vocabulary: "Vocabulary", valLoss: "Validation loss",
    training: "Training", date: "Date", command: "Command", weights: "Weights",
    parametersOf: (all, ofNgrams) => ofNgrams ? `${all}, of which ${ofNgrams} are n-gram vectors` : all,
    shapeOf: (layers, heads, width, context) =>
      `${counted(layers, "layer")}, ${counted(heads, "head")}, ${width} wide; a context of ${context} tokens`,
    vocabularyOf: (count, kind) => `${count} tokens (${kind})`,
    nats: (loss) => `${loss} nats per token`,
    trainingOf: (steps, tokens, time) => [`${steps} steps`, tokens && `${tokens} tokens`, time].filter(Boolean).join(", "),
    minutes: (minutes, seconds) => minutes ? `${minutes} min ${seconds} s` : `${seconds} s`,
    bitsOf: (bits) => `${bits} bits each, with a scale for every row`,
  },
  zh: {
    prompt: "写个开头，模型接着往下写",
    temperature: "温度", topK: "Top-k（0 为不限）", length: "token 数", seed: "随机种子", dice: "换一个种子",
    write: "开始写", stop: "停止", continueText: "接着写", edit: "修改",
    textHint: "文本会出现在这里。上面不填也可以，模型会自己开头。",
    textLabel: "逐个 token 的文本：用方向键选择",
    colours: "着色", expected: "意料之中", surprising: "出乎意料",
    tokenTitle: "这里还可能是什么",
    tokenHint: "点选文本中的一个 token，看看模型认为这里可能出现什么。",
    keys: "点一个候选 token，就从那里改用它往下写。键盘：在文本中用方向键选择，再按 1 到 9 或 0；Ctrl+Enter 开始写，Esc 停止。",
    close: "关闭",
    first: "这是第一个 token，前面没有内容。",
    facts: (p, bits, rank, all) => `概率 ${p}，意外程度 ${bits} 比特；在 ${all} 个 token 中排第 ${rank}。`,
    loading: "正在载入……", speed: (count, speed) => `${count} 个 token，每秒 ${speed} 个`,
    reading: "正在阅读……",
    unknown: (characters) => `模型没有见过这些字符：${characters}`,
    error: (message) => `出错了：${message}`,
    noWorker: "这个浏览器无法运行模型：它不允许本地网页使用 Worker。",
    summary: (parameters) => `一个有 ${parameters}个参数的语言模型，整个就在这个网页里。您输入的内容不会离开这里。`,
    card: "关于这个模型",
    dataset: "训练数据", parameters: "参数", shape: "结构", vocabulary: "词表", valLoss: "验证损失",
    training: "训练", date: "日期", command: "命令", weights: "权重",
    parametersOf: (all, ofNgrams) => ofNgrams ? `${all}，其中 ${ofNgrams} 是 n 元组向量` : all,
    shapeOf: (layers, heads, width, context) => `${layers} 层，${heads} 个注意力头，宽 ${width}；上下文 ${context} 个 token`,
    vocabularyOf: (count, kind) => `${count} 个 token（${kind}）`,
    nats: (loss) => `每个 token ${loss} 奈特`,
    trainingOf: (steps, tokens, time) => [`${steps} 步`, tokens && `${tokens} 个 token`, time].filter(Boolean).join("，"),
    minutes: (minutes, seconds) => minutes ? `${minutes} 分 ${seconds} 秒` : `${seconds} 秒`,
    bitsOf: (bits) => `每个 ${bits} 位，每行一个比例系数`,
  },
};

const LANGUAGE = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const SAY = TEXTS[LANGUAGE];

function number(value, digits = 0) {
  return value.toLocaleString(LANGUAGE, {minimumFractionDigits: digits, maximumFractionDigits: digits});
}

function short(value) {
  return value.toLocaleString(LANGUAGE, {notation: "compact", maximumSignificantDigits: 3});
}

function percent(p) {
  return p < 0.0001 ? `<${number(0.01, 2)}%` : `${number(100 * p, p < 0.0995 ? 2 : 1)}%`;
}

// 1 layer, 2 layers.
function counted(count, noun) {
  return count === 1 ? `${count} ${noun}` : `${count} ${noun}s`;
}

// White space made visible.
function visible(name) {
  return name.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍") || "∅";
}
