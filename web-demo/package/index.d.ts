/** Types of the package; index.js documents the behaviour. */

export interface Progress {
  /** Share of the whole, 0 to 1. */
  progress: number;
  /** Seconds since loading began. */
  timeElapsed: number;
  /** A sentence for people. */
  text: string;
  phase: "cache" | "fetch" | "upload" | "compile";
  bytes: number;
  totalBytes: number;
  /** Bytes per second since loading began. */
  rate: number;
}

export interface EngineOptions {
  onProgress?: (progress: Progress) => void;
  /** Where worker.js lies, if not beside index.js. */
  workerUrl?: string | URL;
  /** Longest context, tokens; 2048. */
  max_model_len?: number;
  /** Requests that run at a time; 4. */
  max_num_seqs?: number;
  /** Tokens of a step; 256. */
  max_num_batched_tokens?: number;
  /** Derives the seeds of requests that bring none. */
  seed?: number;
}

export interface Info {
  model: string;
  architecture: string;
  /** Adapter, backend and tier. */
  adapter: string;
  layers: number;
  moe_layers: { layer: number; experts: number; top_k: number }[];
  weight_bytes: number;
  device_bytes: number;
  context: number;
  timestamps: boolean;
}

export interface Support {
  webgpu: boolean;
  adapter: string;
  shaderF16: boolean;
  subgroups: boolean;
  timestamps: boolean;
  maxBufferBytes: number;
  freeStorageBytes: number | undefined;
  /** Why it cannot run here, each with the cure; empty if it can. */
  problems: Error[];
}

/** Names of the errors that calls reject with. */
export type ErrorName =
  | "WebGPUNotAvailableError"
  | "WebGPUNotFoundError"
  | "DeviceLostError"
  | "OutOfMemoryError"
  | "DeviceError"
  | "ModelError"
  | "ModelNotLoadedError"
  | "RequestError"
  | "DownloadError"
  | "IntegrityError"
  | "StorageFullError"
  | "StorageError"
  | "WorkerError"
  | "AbortError";

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface Sampling {
  max_tokens?: number;
  max_completion_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  seed?: number;
  stop?: string | string[];
  presence_penalty?: number;
  frequency_penalty?: number;
  repetition_penalty?: number;
  ignore_eos?: boolean;
  stream_options?: { include_usage?: boolean };
}

export interface ChatRequest extends Sampling {
  messages: Message[];
}

export interface CompletionRequest extends Sampling {
  prompt: string;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  extra: { time_to_first_token_s: number; decode_tokens_per_s: number; e2e_latency_s: number };
}

export type FinishReason = "stop" | "length" | "abort" | null;

interface Frame<Choice> {
  id: string;
  object: string;
  created: number;
  model: string;
  choices: Choice[];
  usage?: Usage;
}

/** Beside OpenAI's fields: the token, and the experts that computed it, layer after layer. */
export interface Routed {
  moewe?: { token: number | null; experts: number[] };
}

export type ChatChunk = Frame<{
  index: number;
  delta: { role?: "assistant"; content?: string };
  finish_reason: FinishReason;
}> &
  Routed;
export type ChatCompletion = Frame<{
  index: number;
  message: { role: "assistant"; content: string };
  finish_reason: FinishReason;
}>;
export type CompletionChunk = Frame<{ index: number; text: string; finish_reason: FinishReason }> & Routed;
export type Completion = Frame<{ index: number; text: string; finish_reason: FinishReason }>;

interface Create<Request, Chunk, Whole> {
  create(body: Request & { stream: true }): Promise<AsyncIterable<Chunk>>;
  create(body: Request & { stream?: false }): Promise<Whole>;
}

export class MoeweEngine {
  constructor(options?: EngineOptions);
  readonly info: Info | undefined;
  readonly chat: { completions: Create<ChatRequest, ChatChunk, ChatCompletion> };
  readonly completions: Create<CompletionRequest, CompletionChunk, Completion>;
  reload(model?: string | File[]): Promise<Info>;
  unload(): Promise<void>;
  terminate(): void;
  interruptGenerate(): Promise<void>;
  resetChat(): Promise<void>;
  getStats(): Usage | undefined;
  runtimeStatsText(): string;
  profile(work: () => Promise<unknown>): Promise<{ kernel: string; calls: number; ms: number }[]>;
  hasModelInCache(url: string): Promise<boolean>;
  deleteModelInCache(url?: string): Promise<void>;
}

export function createEngine(model: string | File[], options?: EngineOptions): Promise<MoeweEngine>;
export function checkSupport(): Promise<Support>;
