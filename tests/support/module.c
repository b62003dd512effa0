/* A PKCS #11 module that hands every call to SoftHSM, unless it is told otherwise: for what no token can be brought to say.
 *
 * Built by tests/support/softhsm.rs with REAL, CONF and TOLD. The file TOLD holds lines `FUNCTION ANSWER`: a hexadecimal
 * return code, or `hang`, which ends when the line is gone. Every call is written into TOLD.calls.
 * The function list is a version and 68 pointers, in the standard's order; no function has more than eight arguments. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long word;
typedef word (*call)(word, word, word, word, word, word, word, word);
struct list { unsigned char version[2]; call of[68]; };

static struct list *real, ours;

#define EACH(X) \
    X(0, Initialize) X(1, Finalize) X(2, GetInfo) X(4, GetSlotList) X(5, GetSlotInfo) X(6, GetTokenInfo) \
    X(12, OpenSession) X(13, CloseSession) X(18, Login) X(19, Logout) X(22, DestroyObject) X(24, GetAttributeValue) \
    X(25, SetAttributeValue) X(26, FindObjectsInit) X(27, FindObjects) X(29, EncryptInit) X(30, Encrypt) \
    X(33, DecryptInit) X(34, Decrypt) X(64, GenerateRandom)

static int told(const char *name, word *answer) {
    char line[100], whose[50], what[50];
    FILE *calls = fopen(TOLD ".calls", "a");
    if (calls) {
        fprintf(calls, "C_%s\n", name);
        fclose(calls);
    }
    for (;;) {
        int hangs = 0, answers = 0;
        FILE *file = fopen(TOLD, "r");
        while (file && fgets(line, sizeof line, file)) {
            if (sscanf(line, "C_%49s %49s", whose, what) != 2 || strcmp(whose, name)) continue;
            if (!strcmp(what, "hang")) hangs = 1;
            else answers = 1, *answer = strtoul(what, 0, 16);
        }
        if (file) fclose(file);
        if (!hangs) return answers;
        usleep(5000);
    }
}

#define DEFINE(n, name) \
    static word ours_##name(word a, word b, word c, word d, word e, word f, word g, word h) { \
        word answer; \
        return told(#name, &answer) ? answer : real->of[n](a, b, c, d, e, f, g, h); \
    }
EACH(DEFINE)

word C_GetFunctionList(struct list **list) {
    if (!real) {
        setenv("SOFTHSM2_CONF", CONF, 1);
        void *library = dlopen(REAL, RTLD_NOW);
        word (*get)(struct list **) = library ? (word (*)(struct list **))dlsym(library, "C_GetFunctionList") : 0;
        if (!get || get(&real)) return 5;
        ours = *real;
#define SET(n, name) ours.of[n] = ours_##name;
        EACH(SET)
    }
    *list = &ours;
    return 0;
}
