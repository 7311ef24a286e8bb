# SPDX-License-Identifier: MIT
"""The programs of `bench real`. Each needs more memory than it gets, and checks each of its values.

    objects.py     Python objects in a dictionary                     heap.js      JavaScript objects in a Map
    database.py    SQLite, whose cache holds the whole database       Heap.java    Java objects in a HashMap
    values.py      values in a redis server, and the client that checks them

All programs do the same. They build their records. They use random records; four of five uses go to a fifth of the records.
At the end they check every record. A record follows from its number, so a program can build the right record and compare.
A program prints one line of JSON, {"records": N, "bad": M}. The exit status is 1 if a record was wrong.
"""
