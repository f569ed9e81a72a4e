/*
 * The guest's first process. Written against system calls alone: a program of
 * two pages starts with a handful of page faults, where a static C library costs
 * sixty and a shell script some thousand, and each is about a millisecond on a
 * host whose KVM emulates kernel mode.
 *
 * It mounts the usual file systems and says "samepage-init: ready". With
 * samepage.run=<command> or samepage.run64=<base64 of it> on the kernel command
 * line it gives that to the shell, says "samepage-init: exit <status>" and powers
 * off; with samepage.keep it stays instead. Without a command it runs an
 * interactive shell on the console and powers off when that ends.
 */
#include <stddef.h>
#include <stdint.h>

/* Numbers from the kernel's uapi headers (asm/unistd_64.h and others). */
enum {
	SYS_read = 0, SYS_write = 1, SYS_open = 2, SYS_close = 3, SYS_ioctl = 16,
	SYS_pause = 34, SYS_fork = 57, SYS_execve = 59, SYS_exit = 60, SYS_wait4 = 61,
	SYS_dup2 = 33, SYS_mkdir = 83, SYS_setsid = 112, SYS_sync = 162,
	SYS_mount = 165, SYS_reboot = 169,
	O_RDWR = 2,
	TIOCSCTTY = 0x540e,
	TCSBRK = 0x5409,
};
#define REBOOT_MAGIC1 0xfee1deadUL
#define REBOOT_MAGIC2 672274793UL
#define REBOOT_POWER_OFF 0x4321fedcUL
/* COMMAND_LINE_SIZE of the kernel. */
#define COMMAND_LINE_MAX 2048

static long call(long number, unsigned long a, unsigned long b, unsigned long c,
		 unsigned long d, unsigned long e)
{
	long result;
	register unsigned long r10 __asm__("r10") = d;
	register unsigned long r8 __asm__("r8") = e;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

/* GCC makes calls to these of loops it recognises. */
void *memset(void *to, int byte, size_t count)
{
	void *start = to;

	__asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(byte) : "memory");
	return start;
}

size_t strlen(const char *text)
{
	size_t length = 0;

	while (text[length]) {
		__asm__ volatile("");
		length++;
	}
	return length;
}

static void say(const char *text)
{
	call(SYS_write, 1, (unsigned long)text, strlen(text), 0, 0);
}

static void say_number(unsigned value)
{
	char digits[12];
	char *at = digits + sizeof(digits) - 1;

	*at = 0;
	do {
		*--at = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	say(at);
}

static void mount(const char *type, const char *where)
{
	if (call(SYS_mount, (unsigned long)type, (unsigned long)where,
		 (unsigned long)type, 0, 0) < 0) {
		say("samepage-init: cannot mount ");
		say(where);
		say("\n");
	}
}

/*
 * The next word of a kernel command line, quotes removed as the kernel does:
 * a '"' anywhere starts and ends a stretch in which spaces do not separate.
 * Works in place; returns NULL at the end.
 */
static char *next_word(char **rest)
{
	char *from = *rest;
	char *word, *to;
	int quoted = 0;

	while (*from == ' ' || *from == '\n')
		from++;
	if (!*from)
		return NULL;
	word = to = from;
	for (; *from && (quoted || (*from != ' ' && *from != '\n')); from++) {
		if (*from == '"')
			quoted = !quoted;
		else
			*to++ = *from;
	}
	*rest = *from ? from + 1 : from;
	*to = 0;
	return word;
}

/* What follows `name` in `word`, or NULL if it starts otherwise. */
static char *after(char *word, const char *name)
{
	while (*name)
		if (*word++ != *name++)
			return NULL;
	return word;
}

static int base64_digit(char digit)
{
	if (digit >= 'A' && digit <= 'Z')
		return digit - 'A';
	if (digit >= 'a' && digit <= 'z')
		return digit - 'a' + 26;
	if (digit >= '0' && digit <= '9')
		return digit - '0' + 52;
	if (digit == '+' || digit == '-')
		return 62;
	if (digit == '/' || digit == '_')
		return 63;
	return -1;
}

/* Decodes in place, both alphabets; whatever is no digit ends it. */
static void decode_base64(char *text)
{
	uint32_t bits = 0;
	int count = 0;
	char *to = text;

	for (; base64_digit(*text) >= 0; text++) {
		bits = bits << 6 | (uint32_t)base64_digit(*text);
		count += 6;
		if (count >= 8) {
			count -= 8;
			*to++ = (char)(bits >> count);
		}
	}
	*to = 0;
}

/* The console as controlling terminal, so that ^C reaches the command. */
static void take_terminal(void)
{
	long tty;

	call(SYS_setsid, 0, 0, 0, 0, 0);
	tty = call(SYS_open, (unsigned long)"/dev/ttyS0", O_RDWR, 0, 0, 0);
	if (tty < 0)
		tty = call(SYS_open, (unsigned long)"/dev/hvc0", O_RDWR, 0, 0, 0);
	if (tty < 0)
		return;
	call(SYS_ioctl, (unsigned long)tty, TIOCSCTTY, 0, 0, 0);
	for (unsigned long fd = 0; fd < 3; fd++)
		call(SYS_dup2, (unsigned long)tty, fd, 0, 0, 0);
	if (tty > 2)
		call(SYS_close, (unsigned long)tty, 0, 0, 0, 0);
}

/* Runs the shell, with a command or interactive; its status as a shell shows it. */
static unsigned run_shell(const char *command)
{
	static const char *const environment[] = {
		"PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/", "TERM=vt102", NULL,
	};
	const char *with_command[] = { "sh", "-c", command, NULL };
	const char *interactive[] = { "sh", "-i", NULL };
	int status = 0;
	long child = call(SYS_fork, 0, 0, 0, 0, 0);

	if (child == 0) {
		take_terminal();
		call(SYS_execve, (unsigned long)"/bin/sh",
		     (unsigned long)(command ? with_command : interactive),
		     (unsigned long)environment, 0, 0);
		call(SYS_exit, 127, 0, 0, 0, 0);
	}
	if (child < 0)
		return 126;
	/* Orphans are ours as well and are collected on the way. */
	while (call(SYS_wait4, (unsigned long)-1, (unsigned long)&status, 0, 0, 0) != child)
		;
	if (status & 0x7f)
		return 128 + (unsigned)(status & 0x7f);
	return (unsigned)(status >> 8) & 0xff;
}

static void power_off(void)
{
	/* tcdrain(3): what is still in the console's buffer would be lost. */
	call(SYS_ioctl, 1, TCSBRK, 1, 0, 0);
	call(SYS_sync, 0, 0, 0, 0, 0);
	call(SYS_reboot, REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_POWER_OFF, 0, 0);
}

void start(void)
{
	static char line[COMMAND_LINE_MAX + 1];
	char *rest = line, *word, *value, *command = NULL;
	int keep = 0;
	long file;

	mount("proc", "/proc");
	mount("sysfs", "/sys");
	mount("devtmpfs", "/dev");
	mount("tmpfs", "/tmp");
	call(SYS_mkdir, (unsigned long)"/dev/pts", 0755, 0, 0, 0);
	mount("devpts", "/dev/pts");

	file = call(SYS_open, (unsigned long)"/proc/cmdline", 0, 0, 0, 0);
	if (file >= 0) {
		call(SYS_read, (unsigned long)file, (unsigned long)line, COMMAND_LINE_MAX, 0, 0);
		call(SYS_close, (unsigned long)file, 0, 0, 0, 0);
	}
	while ((word = next_word(&rest))) {
		if ((value = after(word, "samepage.run="))) {
			command = value;
		} else if ((value = after(word, "samepage.run64="))) {
			decode_base64(value);
			command = value;
		} else if ((value = after(word, "samepage.keep")) && !*value) {
			keep = 1;
		}
	}

	say("samepage-init: ready\n");
	do {
		unsigned status = run_shell(command);

		say("samepage-init: exit ");
		say_number(status);
		say("\n");
	} while (keep && !command);
	while (keep)
		if (call(SYS_wait4, (unsigned long)-1, 0, 0, 0, 0) < 0)
			call(SYS_pause, 0, 0, 0, 0, 0);
	power_off();
	for (;;)
		call(SYS_pause, 0, 0, 0, 0, 0);
}

/* The kernel enters with the stack 16-aligned and no return address. */
__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	call start\n");
