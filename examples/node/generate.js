// Prints a text as it is generated. When a call breaks, the stream goes on in the next one, where it was:
// nothing is missing or repeated. docs/api.md, "Streams that survive", has the rules that this follows.
//
//     node generate.js --address 127.0.0.1:9000 --model python-4k --seed 9007199254740993 'def '

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const KEEP_S = 60; // the server keeps the stream for so long while nobody reads it
const GIVE_UP_S = 60; // without an event for so long, we do not try again
const LONGEST_WAIT_S = 5;
const MOST_LAST_IDS = 1024;

const definition = protoLoader.loadSync(
  ['concertina/v1/generation_service.proto', 'concertina/v1/session_service.proto'],
  {
    includeDirs: [fileURLToPath(new URL('../../protos', import.meta.url))],
    keepCase: true, // names as in the .proto files and docs/api.md
    longs: String, // a seed may be above 2^53, where a number of JavaScript would be rounded
    enums: String,
    defaults: true,
    oneofs: true, // message.event is the name of the event
  },
);
const { GenerationService, SessionService } = grpc.loadPackageDefinition(definition).concertina.v1;

// A lost connection, a dying server or a proxy between may end a call with these.
const { CANCELLED, INTERNAL, NOT_FOUND, UNAVAILABLE, UNKNOWN } = grpc.status;
const BROKEN = new Set([CANCELLED, INTERNAL, UNAVAILABLE, UNKNOWN]);

const seconds = (duration) => (duration ? Number(duration.seconds) + duration.nanos / 1e9 : 0);

/** Whether the stream may go on after a call that ended with this error. */
function isBroken(error) {
  const withoutReplica = error.code === NOT_FOUND && error.details?.includes('RayServeAPIService');
  return BROKEN.has(error.code) || withoutReplica; // Ray answers so while no replica does
}

/** Whether the stream may go on after this event: the server stops, or has no room just now. */
function isPassing(error, seen, isFirst) {
  if (error.code === 'UNAVAILABLE') return isFirst || seen.accepted?.durable;
  return error.code === 'RESOURCE_EXHAUSTED' && isFirst && seen.accepted !== null;
}

/** What we have of the stream, as Resume takes it. */
function resumeRequest(seen) {
  const { tokens, characters, lastIds } = seen;
  return {
    stream_id: seen.accepted.stream_id,
    after_sequence: seen.sequence,
    cursors: [{ output: 0, tokens, characters, last_ids: lastIds }],
  };
}

/** Notes what a message brings. Messages are numbered from 1 without gaps. */
function note(seen, message) {
  if (BigInt(message.sequence) !== BigInt(seen.sequence) + 1n) {
    throw new Error(`event ${message.sequence} follows event ${seen.sequence}`);
  }
  seen.sequence = message.sequence;
  if (message.event === 'accepted') seen.accepted = message.accepted;
  if (message.event === 'tokens') {
    seen.tokens += message.tokens.ids.length;
    seen.characters += [...message.tokens.text].length; // code points, not UTF-16 units
    seen.lastIds = seen.lastIds.concat(message.tokens.ids).slice(-MOST_LAST_IDS);
  }
}

/** The messages of one stream, over as many calls as it takes; the last is `finished`. */
async function* generate(address, request, onBreak) {
  const credentials = grpc.credentials.createInsecure();
  const options = { 'grpc.initial_reconnect_backoff_ms': 200, 'grpc.max_reconnect_backoff_ms': 3000 };
  const generation = new GenerationService(address, credentials, options);
  const first = { ...request, keep: { seconds: KEEP_S }, idempotency_key: randomUUID() };
  const seen = { accepted: null, sequence: '0', tokens: 0, characters: 0, lastIds: [] };
  let [lastEvent, failures] = [Date.now(), 0];
  try {
    for (;;) {
      // Before `accepted`, the same request with the same key takes up the same stream.
      const call = seen.accepted ? generation.Resume(resumeRequest(seen)) : generation.Generate(first);
      call.on('error', () => {}); // also when we have left the loop, which throws errors otherwise
      let [why, wait, isFirst] = ['the call ended before the stream', 0, true];
      try {
        for await (const message of call) {
          if (message.event === 'handed_over') {
            why = 'the server hands the stream over';
            break;
          }
          if (message.event === 'error') {
            const { code, message: text, retry_after: after } = message.error;
            if (!isPassing(message.error, seen, isFirst)) throw new Error(`${code}: ${text}`);
            [why, wait] = [text, seconds(after)];
            break;
          }
          note(seen, message);
          [lastEvent, failures, isFirst] = [Date.now(), 0, false];
          yield message;
          if (message.event === 'finished') return;
        }
      } catch (error) {
        if (!isBroken(error)) throw error;
        why = error.details;
      } finally {
        call.cancel();
      }
      wait += Math.random() * Math.min(LONGEST_WAIT_S, 0.1 * 2 ** failures++);
      if (Date.now() - lastEvent + 1000 * wait > 1000 * GIVE_UP_S) throw new Error(`cut off: ${why}`);
      onBreak(why);
      await sleep(1000 * wait);
    }
  } finally {
    // Also when the reader leaves early: the server need not keep the stream any more.
    if (seen.accepted) await forget(address, credentials, seen.accepted.stream_id);
    generation.close();
  }
}

function forget(address, credentials, streamId) {
  const sessions = new SessionService(address, credentials);
  const deadline = Date.now() + 2000;
  return new Promise((done) => {
    sessions.Delete({ stream_id: streamId }, new grpc.Metadata(), { deadline }, done);
  }).finally(() => sessions.close());
}

/** A whole number, as its digits: the library would make another of one that is too large, and 0 of a word. */
function digits(name, value, most) {
  if (/^\d{1,20}$/.test(value) && BigInt(value) <= most) return value;
  throw new Error(`--${name} is '${value}': it must be a whole number of 0 to ${most}`);
}

async function main() {
  const text = (value) => ({ type: 'string', default: value });
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      address: text('127.0.0.1:9000'),
      model: text(''),
      seed: { type: 'string' },
      'max-tokens': text('500'),
    },
  });
  const request = {
    model: values.model,
    prompt: { text: positionals[0] ?? 'def ' },
    // A string of digits: see `longs`.
    sampling: values.seed === undefined ? {} : { seed: digits('seed', values.seed, 2n ** 64n - 1n) },
    stopping: {
      max_tokens: Number(digits('max-tokens', values['max-tokens'], 2n ** 32n - 1n)),
      ignore_eos: true,
    },
  };
  // Whoever stops us leaves the loop below, which deletes the stream; a second Ctrl-C does not wait.
  let isLeft = false;
  const leave = () => (isLeft = true);
  process.once('SIGINT', leave).once('SIGTERM', leave);
  process.stdout.on('error', leave); // nobody reads on: `node generate.js | head -c 100`
  const onBreak = (why) => console.error(`\n[trying again after: ${why}]`);
  for await (const message of generate(values.address, request, onBreak)) {
    if (message.event === 'accepted') console.error(`[seed ${message.accepted.sampling.seed}]`);
    if (message.event === 'tokens') process.stdout.write(message.tokens.text);
    if (message.event === 'finished') console.error(`\n[${message.finished.reason}]`);
    if (isLeft) break;
  }
}

main().catch((error) => {
  console.error(`\nerror: ${error.details ?? error.message}`);
  process.exitCode = 1;
});
