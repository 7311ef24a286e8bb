// SPDX-License-Identifier: MIT
// JavaScript objects in a Map.
//
//     heap.js MIB
"use strict";

const RECORD_BYTES = 1300; // memory of a record, its entry in the Map, and the room of the garbage collector; measured
const USES_PER_MIB = 16;
const TEXT_CHARACTERS = 1 << 20;
const STATES = ["new", "paid", "packed", "shipped", "delivered", "returned"];
const LETTERS = "eeeeeetttttaaaaooooiiiinnnnssshhhrrrddlluucmwfgypbvk";

// Returns a pseudo-random number of 32 bits (the finalizer of MurmurHash3).
function mixed(number) {
    number = Math.imul(number ^ (number >>> 16), 0x85ebca6b);
    number = Math.imul(number ^ (number >>> 13), 0xc2b2ae35);
    return (number ^ (number >>> 16)) >>> 0;
}

// Returns a text of orders as JSON.
function makeText() {
    let state = 1;
    const chance = (below) => (state = mixed(state + 0x9e3779b9)) % below;
    const words = Array.from({ length: 4000 }, () =>
        Array.from({ length: 2 + chance(9) }, () => LETTERS[chance(LETTERS.length)]).join(""));
    let text = "";
    while (text.length < TEXT_CHARACTERS) {
        const item = [0, 1, 2].map(() => words[chance(words.length)]).join(" ");
        const [at, state] = ["2026-11-" + (10 + chance(21)), STATES[chance(STATES.length)]];
        text += JSON.stringify({ order: chance(1e6), at, item, state, price: chance(1e4) / 100 });
    }
    return Buffer.from(text, "latin1");
}

const text = makeText();

// Returns `length` characters of the text, at a place that follows from `number`: a new string, not a part of a longer one.
function cut(number, length) {
    const start = mixed(number + 1) % (TEXT_CHARACTERS - length);
    return text.latin1Slice(start, start + length);
}

function makeRecord(number) {
    return {
        number,
        name: cut(number, 24),
        mail: number + "@" + cut(~number, 16).replaceAll(" ", "."),
        orders: cut(number * 2, 240),
        tags: [0, 1, 2, 3].map((at) => cut(number + at, 12)),
        score: mixed(number) / 3,
        used: 0,
    };
}

function same(one, other) {
    return one.number === other.number && one.name === other.name && one.mail === other.mail && one.orders === other.orders
        && one.score === other.score && one.tags.every((tag, at) => tag === other.tags[at]);
}

const mib = Number(process.argv[2]);
const count = Math.floor(mib * (1 << 20) / RECORD_BYTES);
const records = new Map();
for (let number = 0; number < count; number++) records.set("customer " + number, makeRecord(number));

const used = new Uint32Array(count);
let bad = 0;
for (let use = 0; use < mib * USES_PER_MIB; use++) {
    let number = mixed(use ^ 0x5eed) % count;
    if (mixed(use) % 5) number -= number % 5;
    const record = records.get("customer " + number);
    if (record.used !== used[number] || record.orders !== cut(number * 2, 240)) bad++;
    record.used = ++used[number];
}
for (let number = 0; number < count; number++) {
    const record = records.get("customer " + number);
    if (record.used !== used[number] || !same(record, makeRecord(number))) bad++;
}
console.log(JSON.stringify({ records: count, bad }));
process.exitCode = bad ? 1 : 0;
