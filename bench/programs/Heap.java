// SPDX-License-Identifier: MIT
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;

/** A program with Java objects in a HashMap: {@code java Heap MIB}. */
final class Heap {
    /** Memory of a record, its entry in the map, and the room of the garbage collector. Measured. */
    private static final int RECORD_BYTES = 1170;
    private static final int USES_PER_MIB = 16;
    private static final int TEXT_CHARACTERS = 1 << 20;
    private static final String LETTERS = "eeeeeetttttaaaaooooiiiinnnnssshhhrrrddlluucmwfgypbvk";
    private static final String[] STATES = {"new", "paid", "packed", "shipped", "delivered", "returned"};
    private static final byte[] TEXT = makeText();

    /** The record of one customer. */
    private static final class Record {
        final int number;
        final String name;
        final String mail;
        final String orders;
        final List<String> tags = new ArrayList<>(4);
        final double score;
        int used;

        Record(int number) {
            this.number = number;
            name = cut(number, 24);
            mail = number + "@" + cut(~number, 16).replace(' ', '.');
            orders = cut(number * 2, 240);
            for (int at = 0; at < 4; at++) tags.add(cut(number + at, 12));
            score = mixed(number) / 3.0;
        }

        boolean same(Record other) {
            return number == other.number && score == other.score && name.equals(other.name) && mail.equals(other.mail)
                && orders.equals(other.orders) && tags.equals(other.tags);
        }
    }

    /** Returns a pseudo-random number of 32 bits (the finalizer of MurmurHash3), not negative. */
    private static int mixed(int number) {
        number = (number ^ number >>> 16) * 0x85ebca6b;
        number = (number ^ number >>> 13) * 0xc2b2ae35;
        return (number ^ number >>> 16) & 0x7fffffff;
    }

    /** Returns a text of orders as JSON. */
    private static byte[] makeText() {
        Random chance = new Random(1);
        String[] words = new String[4000];
        for (int number = 0; number < words.length; number++) {
            StringBuilder word = new StringBuilder();
            for (int left = 2 + chance.nextInt(9); left > 0; left--) word.append(LETTERS.charAt(chance.nextInt(LETTERS.length())));
            words[number] = word.toString();
        }
        StringBuilder text = new StringBuilder();
        while (text.length() < TEXT_CHARACTERS) {
            text.append("{\"order\": ").append(chance.nextInt(1000000)).append(", \"at\": \"2026-11-").append(10 + chance.nextInt(21));
            text.append("\", \"item\": \"");
            for (int word = 0; word < 3; word++) text.append(words[chance.nextInt(words.length)]).append(' ');
            text.append("\", \"state\": \"").append(STATES[chance.nextInt(STATES.length)]);
            text.append("\", \"price\": ").append(chance.nextInt(10000) / 100.0).append('}');
        }
        return text.toString().getBytes(StandardCharsets.ISO_8859_1);
    }

    /** Returns characters of the text, at a place that follows from a number. */
    private static String cut(int number, int length) {
        return new String(TEXT, mixed(number + 1) % (TEXT_CHARACTERS - length), length, StandardCharsets.ISO_8859_1);
    }

    public static void main(String[] words) {
        int mib = Integer.parseInt(words[0]);
        int count = (int) (mib * (1L << 20) / RECORD_BYTES);
        Map<String, Record> records = new HashMap<>();
        for (int number = 0; number < count; number++) records.put("customer " + number, new Record(number));
        int[] used = new int[count];
        int bad = 0;
        for (int use = 0; use < mib * USES_PER_MIB; use++) {
            int number = mixed(use ^ 0x5eed) % count;
            if (mixed(use) % 5 != 0) number -= number % 5;
            Record record = records.get("customer " + number);
            if (record.used != used[number] || !record.orders.equals(cut(number * 2, 240))) bad++;
            record.used = ++used[number];
        }
        for (int number = 0; number < count; number++) {
            Record record = records.get("customer " + number);
            if (record.used != used[number] || !record.same(new Record(number))) bad++;
        }
        System.out.println("{\"records\": " + count + ", \"bad\": " + bad + "}");
        System.exit(bad != 0 ? 1 : 0);
    }
}
